"""Instruction tasks: one meaning, many wordings, and the contents it is applied to."""
