"""Ranking: which latents carry an instruction."""
