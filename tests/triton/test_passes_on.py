"""What Triton cannot do is known before a backend is chosen, so that the next one does it."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import backends
from loopmdm_kernels.testing import head_inputs, looped_inputs, reference, row_rng
from loopmdm_kernels.types import Head


def blocks_of(num_heads=1, **options):
    inputs = looped_inputs(1, 3, 258, num_heads, 1, mlp_ratio=1).to(torch.float32)

    def run(ops):
        return ops.looped_blocks(
            inputs.x, inputs.blocks, inputs.modulation, 2, num_heads=num_heads, **options
        )

    return run


def attention(ops):
    q, k, v = torch.randn(3, 1, 1, 4, 258, generator=torch.Generator().manual_seed(0))
    return ops.attention(q, k, v)


def head_of(**changes):
    hidden, head = head_inputs(1, 4, 16, 20)
    return hidden.float(), Head(*(t.float() for t in head[:4]))._replace(**changes)


def logits_without_a_norm(ops):
    return ops.head_logits(*head_of(norm=None))


def draws_in_float64(ops):
    hidden, head = head_of(bias=torch.zeros(20, dtype=torch.float64))
    return ops.sample_rows(hidden, head, torch.arange(3), row_rng(3)).token


def a_wide_loss(ops):
    hidden, head = head_inputs(1, 1, 8200, 5)
    head = Head(*(t.float() for t in head[:4]))
    return ops.masked_cross_entropy(hidden.float(), head, torch.zeros(1, 1, dtype=torch.int64))[1]


CASES = {
    "the head size may be 256, got 258": [blocks_of(), attention],
    "the width of x must be a multiple of 4, got 258": [blocks_of(3, dropout=0.1, dropout_seed=3)],
    "every sequence must have the same number of loops": [
        blocks_of(3, dropout=0.1, exit_threshold=1e-9),
    ],
    "no kernel for a head without a norm": [logits_without_a_norm],
    "head.bias must be float32, bfloat16 or float16": [draws_in_float64],
    "hidden may be 8192 wide, got 8200": [a_wide_loss],
}


@pytest.mark.parametrize(("reason", "run"), [(reason, run) for reason, runs in CASES.items() for run in runs])
def test_what_triton_cannot_do_is_passed_on(reason, run, monkeypatch):
    monkeypatch.setattr(backends, "_passed_over", set())
    with lk.use_backend("triton", "reference"), pytest.warns(UserWarning, match=reason):
        out = run(lk)
    expected = run(reference)
    if isinstance(out, tuple):
        assert torch.equal(out[1], expected[1])
        out, expected = out[0], expected[0]
    assert torch.equal(out, expected)
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        run(lk)
