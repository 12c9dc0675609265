"""The public calls of this room, one file each."""
