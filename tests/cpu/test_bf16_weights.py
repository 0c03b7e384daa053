"""Without instructions for bf16, weights in bf16 are pairs that are widened in registers: the same bits."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import looped_inputs, row_rng
from loopmdm_kernels.types import Head
from tests.conftest import USABLE_ISAS
from tests.looped_blocks.cases import gradients, run

BF16 = torch.bfloat16


@pytest.fixture(params=[isa for isa in USABLE_ISAS if "bf16" not in isa])
def isa(request, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", request.param)


@pytest.mark.parametrize("compute_of", [BF16, torch.float32], ids=["bf16-weights", "fp32-weights"])
@pytest.mark.parametrize(("num_rows", "hidden", "vocab_size"), [(1, 64, 700), (7, 33, 95), (40, 1, 513)])
def test_head(isa, num_rows, hidden, vocab_size, compute_of):
    """Rows whose values bf16 holds: nothing is rounded on the way to the products."""
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(1, num_rows, hidden, generator=generator).to(BF16).float()
    weight = torch.randn(vocab_size, hidden, generator=generator).to(BF16)
    rows, rng = torch.arange(num_rows), row_rng(num_rows)
    with lk.use_backend("cpu"):
        pairs = lk.sample_rows(x, Head.of(weight.to(compute_of)), rows, rng, compute_dtype=BF16)
        floats = lk.sample_rows(x, Head.of(weight.float()), rows, rng)
    for name, value in pairs._asdict().items():
        assert torch.equal(value, getattr(floats, name)), name


@pytest.mark.parametrize(("hidden", "heads", "length"), [(48, 4, 37), (22, 1, 5), (64, 2, 100)])
def test_looped_blocks(isa, hidden, heads, length):
    pairs = looped_inputs(2, length, hidden, heads, 2).to(BF16)
    floats = pairs.to(torch.float32)
    with lk.use_backend("cpu"):
        assert torch.equal(run(pairs, 3), run(floats, 3))
        assert torch.equal(gradients(pairs, 2)["x"], gradients(floats, 2)["x"])
