"""Grades of replies: do they follow the instruction, fluently, and faithfully to the content."""
