"""Which steps of sampling need many loops."""
