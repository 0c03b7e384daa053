"""Device code. Offsets into tensors are 64-bit, sums fp32; the order of programs does not matter."""
