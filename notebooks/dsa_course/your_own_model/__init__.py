"""Notebook 12b, a model of transformers made sparse."""
