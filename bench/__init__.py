"""Benchmarks: one suite an op. `make bench` runs them and writes a result file."""
