"""CUDA kernels for Hopper, and for other GPUs from Ampere on: compiled on first use, by cuda-bindings.

Experimental: they have been compiled, and their schedule proved, without a GPU; none has run on one. No op
uses them unless the backend is asked for with `use_backend("cuda")` or LOOPMDM_BACKEND=cuda.
"""
