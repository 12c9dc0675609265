"""How well a plan steers, compared with controls, and what damage it does."""
