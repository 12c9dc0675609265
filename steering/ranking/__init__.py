"""Which latents carry an instruction."""
