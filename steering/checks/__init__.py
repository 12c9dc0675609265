"""Programs that tell whether a reply follows an instruction."""
