"""The whole pipeline on a small model, as one call."""
