"""Benchmarks: a file an op, with its cases for CPUs and GPUs; `make bench` and `make gpu` run them."""
