"""Benchmarks: a file an op, its cases for CPUs and GPUs once; `make bench` and `make gpu` write result files."""
