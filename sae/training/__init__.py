"""Training: one SAE's parameters, one optimiser step, and the loop over batches."""
