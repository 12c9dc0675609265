"""The steering hook: which positions of which rows are edited, and how, while a model runs."""
