"""Activations: read from a model or from shards, freed of sinks, mixed and cut into batches."""
