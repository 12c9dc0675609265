"""A steered model behind an OpenAI-compatible server: requests batched, a plan for each row."""
