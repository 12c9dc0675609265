"""Steering plans: which directions are used, where, how strongly and by which method."""
