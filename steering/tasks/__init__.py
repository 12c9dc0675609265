"""Instruction tasks: an instruction in several wordings, and the contents it is applied to."""
