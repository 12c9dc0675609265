"""How well a plan steers, beside everything it should be compared with, and what it breaks."""
