"""Text in a terminal while it comes about."""
