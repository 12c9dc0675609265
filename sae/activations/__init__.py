"""Activations: read from a model or from shards, without attention sinks, shuffled, batched."""
