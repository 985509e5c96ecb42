"""Notebook 14, a million tokens."""
