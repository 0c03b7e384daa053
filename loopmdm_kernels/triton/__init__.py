"""Kernels in Triton for NVIDIA GPUs from Ampere on, one file an op; the device code is in `kernels`.

Importing this needs no GPU and no Triton; importing an op's module needs Triton, calling it a GPU, or
TRITON_INTERPRET=1 for tensors on the CPU (slow, for tests).
"""
