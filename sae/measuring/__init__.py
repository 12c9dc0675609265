"""How good an SAE is: errors, latents, stability, and what it finds of a known truth."""
