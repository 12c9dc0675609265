"""Text: corpora, prompts and the model's own replies, packed into contexts of tokens."""
