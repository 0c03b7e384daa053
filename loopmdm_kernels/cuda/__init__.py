"""Hopper kernels: compiled on first use, launched through cuda-python.

Experimental: they have been compiled, and their schedule proved, without a GPU; none has run on one. No op
uses them unless the backend is asked for with `use_backend("cuda")` or LOOPMDM_BACKEND=cuda.
"""
