"""How fast the kernels are on a machine: cases, intervals, comparison with an earlier run, and a page."""
