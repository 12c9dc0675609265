"""Pairs of prompts: read, made, and turned into tokens with named positions."""
