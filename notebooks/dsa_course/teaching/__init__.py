"""Notebook 13: how an indexer is taught."""
