"""Checks: programs that decide whether a reply follows an instruction."""
