"""Inputs of sample_rows, its statistics by their definition in float64, and what a draw is compared with."""

from __future__ import annotations

import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs, reference
from loopmdm_kernels.types import Head, RowRng

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
STATISTICS = ("log_prob", "top1_prob", "top2_prob", "entropy")
NOTHING = 1e-30  # the entropy of a row with one possible token, if exponentials do not end in zero
LENGTH = 50
# D and V for which no tile is full and a row has several: interpreted and emulated kernels are slow.
USUAL = {"triton": (36, 301), "cuda": (72, 601), "gpu": (72, 601)}


def case(backend, dtype=None, size=None, *, num_rows=33, excluded=True):
    """(hidden, head, rows, rng), the arguments of the op; rows repeat. excluded: whether a token is."""
    width, vocab_size = size or USUAL.get(backend.kind, (37, 3073))
    excluded_token = vocab_size // 2 if excluded else -1
    hidden, head = head_inputs(3, LENGTH, width, vocab_size, per_sequence_modulation=excluded, seed=width)
    dtype = dtype or (BF16 if backend.name == "cuda" else FLOAT)
    head = Head(*(t.to(backend.device, dtype) for t in head[:4]), excluded_token)
    generator = torch.Generator().manual_seed(vocab_size)
    names = [torch.randint(0, n, (num_rows,), generator=generator) for n in (3 * LENGTH, 2**32, 2**30, 2**31)]
    rows, *names = (name.to(backend.device) for name in names)
    return 3 * hidden.float().to(backend.device), head, rows, RowRng(0x1234567890ABCDEF, *names)


def plain_case(backend, logits, num_rows, *, seed=0, positions=0, width=8):
    """The same arguments where each row has these logits [V], carried by the bias."""
    dtype = BF16 if backend.name == "cuda" else FLOAT
    head = (torch.ones(width), torch.zeros(len(logits), width, dtype=dtype), logits, torch.zeros(1, 2, width))
    zeros, number = torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows)
    rows, *names = (name.to(backend.device) for name in (zeros, number, zeros, zeros + positions))
    hidden = torch.linspace(-1, 1, width).expand(1, 1, width).to(backend.device)
    return hidden, Head(*(t.to(backend.device) for t in head)), rows, RowRng(seed, *names)


def some(inputs, index):
    """Some of the rows."""
    hidden, head, rows, rng = inputs
    return hidden, head, rows[index], RowRng(rng.seed, *(name[index] for name in rng[1:]))


def counts(backend, log_probs, num, *, seed, chunk=100_000, **options):
    """Counts [V] of `num` draws, each its own sequence."""
    hidden, head, rows, rng = plain_case(backend, log_probs.float(), num, seed=seed)
    parts = (some((hidden, head, rows, rng), slice(start, start + chunk)) for start in range(0, num, chunk))
    tokens = torch.cat([lk.sample_rows(*part, **options).token for part in parts])
    return tokens.bincount(minlength=len(log_probs)).cpu().numpy()


def exact_statistics(hidden, head, rows, token):
    """What the op says of the rows and of the tokens it drew."""
    x = hidden.double().flatten(0, 1)[rows]
    modulation = head.modulation.double().expand(len(hidden), -1, -1)[rows // hidden.shape[1]]
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * head.norm.double()
    logits = (x * (1 + modulation[:, 1]) + modulation[:, 0]) @ head.weight.double().T + head.bias.double()
    if head.excluded_token >= 0:
        logits[:, head.excluded_token] = -torch.inf
    probs = logits.softmax(1)
    top = probs.topk(2).values
    entropy = torch.special.entr(probs).sum(1)
    log_prob = logits.log_softmax(1).gather(1, token[:, None])[:, 0]
    return dict(zip(STATISTICS, (log_prob, top[:, 0], top[:, 1], entropy), strict=True))


def check(backend, inputs, *, tolerance=None, **options):
    """Tokens of the reference; statistics near to its own and as near to float64, in fp32 within 1e-5."""
    hidden, head, rows, _ = inputs
    out, plain = lk.sample_rows(*inputs, **options), reference.sample_rows(*inputs, **options)
    assert out.token.tolist() == plain.token.tolist()
    assert out.top1_token.tolist() == plain.top1_token.tolist()
    # On Hopper an element of a row that lies between two bf16 numbers may be rounded to the other one.
    tolerance = tolerance or (5e-3 if backend.name == "cuda" else 2e-5)
    for name, exact in exact_statistics(hidden, head, rows, out.token).items():
        value, other = getattr(out, name), getattr(plain, name)
        assert value.dtype == FLOAT
        torch.testing.assert_close(value, other, atol=tolerance, rtol=tolerance)
        if (value.double() - exact).abs().max() > NOTHING:
            assert_matches_oracle(value, other, exact, name=name)
        if FLOAT == head.weight.dtype == (options.get("compute_dtype") or FLOAT):
            torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=1e-5)
    return out
