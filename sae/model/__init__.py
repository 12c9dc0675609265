"""A language model: loaded, its hook points found, read, compiled and made to answer."""
