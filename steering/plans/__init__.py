"""Steering plans: what is written where, how strongly and by which method."""
