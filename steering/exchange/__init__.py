"""Plans in the files of other tools, and their vectors as plans."""
