"""File formats of tensors, each read without running what a file holds, and the hub they come from."""
