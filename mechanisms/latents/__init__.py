"""Patches, vectors and comparisons in the latents of a sparse autoencoder, its error included."""
