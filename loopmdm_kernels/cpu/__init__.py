"""Compiled kernels for the CPU, one file an op. Importing this needs no extension; calling does."""
