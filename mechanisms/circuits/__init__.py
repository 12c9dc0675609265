"""Circuits of heads: found by path patching, made smaller, tested, and learned as masks."""
