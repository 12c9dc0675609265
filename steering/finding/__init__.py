"""Finds how to steer towards one instruction: layers, phases, directions or latents, doses."""
