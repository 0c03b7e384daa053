"""FlopCounterMode counts what it counts for the same mathematics in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture
def plain(monkeypatch):
    """Plain PyTorch, not seen as operators; attention in float64 is two products."""

    def apply():
        monkeypatch.setattr("loopmdm_kernels.ops.library.traced", lambda *_: False)

    with lk.use_backend("reference"):
        yield apply


def test_forward(model, tokens, plain):
    model = model.double()

    def run():
        with torch.no_grad():
            model(tokens)

    ours = counted(run)
    plain()
    assert ours == counted(run) > 1e6


def test_training_step(model, tokens, plain):
    model = model.double()

    def run():
        model.loss(tokens, num_loops=2, seed=0).loss.backward()

    ours = counted(run)
    plain()
    # Plain PyTorch does not compute gradients of what nobody asks for; the operator's backward gives all.
    assert ours == pytest.approx(counted(run), rel=0.02)


def test_loops_taken(plain):
    """Of a count for each sequence, and of sequences that leave early."""
    inputs = looped_inputs(batch=3).to(torch.float32)

    def run(loops, **options):
        return lk.looped_blocks(inputs.x, inputs.blocks, inputs.modulation, loops, num_heads=4, **options)

    once = counted(lambda: run(1)) / 3
    assert counted(lambda: run(torch.tensor([1, 4, 2]))) == 7 * once
    used = run(6, exit_threshold=0.5)[1]
    assert counted(lambda: run(6, exit_threshold=0.5)) == int(used.sum()) * once < 18 * once


def test_sample_rows_and_attention():
    hidden, head = head_inputs(2, 16, 32, 20)
    head = Head(*(t.float() for t in head[:4]), -1)
    sampled = counted(lambda: lk.sample_rows(hidden.float(), head, torch.arange(5), row_rng(5)))
    assert sampled == 2 * 5 * 20 * 32
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    forward = 2 * (2 * 2 * 3 * 8 * 8 * 4)
    assert counted(lambda: lk.attention(q, q, q)) == forward
    assert counted(lambda: lk.attention(q, q, q).sum().backward()) == 3 * forward
