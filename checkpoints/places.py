"""The type that names a place in a language model whose activations are read."""

Place = tuple[int, str]
"""Layer (a 0-based block) and site: `(12, "resid_post")`, or a module path for the site."""
