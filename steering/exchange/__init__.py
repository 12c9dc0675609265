"""Export of plans to the files of other tools, and import of their vectors."""
