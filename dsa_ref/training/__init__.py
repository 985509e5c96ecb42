"""Train the small model and its indexer, and say how good they are."""
