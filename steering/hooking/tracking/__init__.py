"""Which tokens a forward pass holds, and where they lie in their rows, however it is run."""
