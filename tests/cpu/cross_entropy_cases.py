"""Cases of masked_cross_entropy on the CPU, and what its tests compare."""

import torch

from loopmdm_kernels import reference
from loopmdm_kernels.cpu import masked_cross_entropy as cpu
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs
from loopmdm_kernels.types import Head

FLOAT, BF16 = torch.float32, torch.bfloat16
LEAVES = ("hidden", "norm", "weight", "bias", "modulation", "row_weights")


def case(width=48, vocab_size=389, num_rows=40, dtype=FLOAT, excluded=True, sequences=True, **options):
    """(leaves, targets, rows, excluded token) in the dtypes of training; rows repeat."""
    hidden, head = head_inputs(3, 11, width, vocab_size, per_sequence_modulation=sequences, **options)
    generator = torch.Generator().manual_seed(width + vocab_size)
    excluded_token = vocab_size // 2 if excluded else -1
    targets = torch.randint(0, vocab_size - excluded, (3, 11), generator=generator)
    if excluded:
        targets += targets >= excluded_token
    rows = torch.randint(0, 33, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator) + 0.5
    leaves = (5 * hidden.float(), *(t.to(dtype) for t in head[:4]), weights)
    return dict(zip(LEAVES, leaves, strict=True)), targets, rows, excluded_token


def run(op, leaves, targets, rows, excluded_token, kind=None, compute_dtype=None, wanted=LEAVES):
    """total, nll and the gradients of `wanted` of 0.7 total + random . nll."""
    leaves = {k: (t if kind is None else t.to(kind)).detach() for k, t in leaves.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    hidden, norm, weight, bias, modulation, row_weights = leaves.values()
    head = Head(norm, weight, bias, modulation, excluded_token)
    total, nll = op(hidden, head, targets, rows, row_weights, compute_dtype=compute_dtype)
    mix = torch.randn(rows.shape[0], generator=torch.Generator().manual_seed(5)).to(nll.dtype)
    grads = torch.autograd.grad(0.7 * total + (mix * nll).sum(), [leaves[name] for name in wanted])
    return {"total": total.detach()[None], "nll": nll.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_case(inputs, compute_dtype=None):
    out = run(cpu.masked_cross_entropy, *inputs, compute_dtype=compute_dtype)
    baseline = run(reference.masked_cross_entropy, *inputs, compute_dtype=compute_dtype)
    oracle = run(reference.masked_cross_entropy, *inputs, kind=torch.float64)
    expected = (out["nll"].double() * inputs[0]["row_weights"].double()).sum()
    torch.testing.assert_close(out["total"][0], expected.float(), rtol=1e-7, atol=0)
    for name, value in out.items():
        assert value.dtype == baseline[name].dtype, name
        if name == "total":  # one number: its error says little
            continue
        assert_matches_oracle(value, baseline[name], oracle[name], name=name)


def assert_same(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name
