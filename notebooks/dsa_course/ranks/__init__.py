"""Notebook 17: who holds which rows, what travels, and processes that compute together."""
