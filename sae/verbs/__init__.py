"""The public calls of this package, one file each."""
