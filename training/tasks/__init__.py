"""Data sets that are made here: the standard library's source, puzzles, and prompts for own answers."""
