"""The IFEval benchmark."""
