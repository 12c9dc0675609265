"""Patches: the exact engine, its slow twin, gradient shortcuts and how far those are off."""
