"""Activations made of known features, so that what an SAE finds can be compared with the truth."""
