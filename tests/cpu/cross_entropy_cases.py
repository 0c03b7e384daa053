"""Cases of masked_cross_entropy on the CPU, and what its tests compare."""

import torch

from loopmdm_kernels.cpu import masked_cross_entropy as cpu
from loopmdm_kernels.testing import assert_cross_entropy, cross_entropy_inputs

FLOAT, BF16 = torch.float32, torch.bfloat16


def case(width=48, vocab_size=389, num_rows=40, dtype=FLOAT, **options):
    return cross_entropy_inputs(width, vocab_size, num_rows, dtype, scale=5.0, **options)


def assert_case(inputs, compute_dtype=None):
    assert_cross_entropy(cpu.masked_cross_entropy, inputs, compute_dtype=compute_dtype)


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name
