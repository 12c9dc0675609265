"""A language model: loaded, its hook points found, read, compiled, and used to generate."""
