"""A training run on disk: what it was asked for, its model and data, and where its figures come from."""
