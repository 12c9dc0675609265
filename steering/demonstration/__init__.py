"""The main job, start to end, as one call."""
