"""What can be read off a model: states that separate, tokens that drive a reply, weights."""
