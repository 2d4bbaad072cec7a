"""Folders of weights: read, written, converted, described."""
