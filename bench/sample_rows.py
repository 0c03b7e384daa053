"""sample_rows beside the draw of the reference model in plain PyTorch, on the same rows."""

from __future__ import annotations

import pytest
import torch

import loopmdm_kernels as lk
from bench import peers
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head

LENGTH, HIDDEN, VOCAB = 1024, 768, 50258


@pytest.mark.parametrize("num_rows", [1, 16, 256], ids=["R1", "R16", "R256"])
def test_sample_rows(compare, num_rows):
    hidden, exact = head_inputs(1, LENGTH, HIDDEN, VOCAB, excluded_token=VOCAB - 1)
    hidden = hidden.float()
    rows = torch.arange(num_rows) * (LENGTH // num_rows)
    rng = row_rng(num_rows)
    variants = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        head = Head(*(tensor.to(dtype) for tensor in exact[:4]), VOCAB - 1)
        draw = peers.compiled(peers.sample_rows)
        variants[f"eager {name}"] = lambda head=head: peers.sample_rows(hidden, head, rows)
        variants[f"compiled {name}"] = lambda head=head, draw=draw: draw(hidden, head, rows)
    with torch.no_grad():
        compare(
            lambda: lk.sample_rows(hidden, head, rows, rng),
            variants,
            flops=2.0 * num_rows * HIDDEN * VOCAB,
            dtype=torch.bfloat16,
            bytes_read=2.0 * VOCAB * HIDDEN,
        )
