"""Calls of the ops that must be refused by name, and values at the edges of fp32."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels.types import BlockWeights, Head, Rotary, RowRng
from tests.fuzz import ops
from tests.fuzz.harness import Wrong
from tests.fuzz.op_inputs import OPS, Draw, Problem

GARBAGE = (
    None, True, -1, 0, 1.5, 2**31, 2**63, 2**70, -(2**63) - 1, math.nan, math.inf, -0.0, 1e-320, 1e300, "",
    "1", b"x", (), [], {}, [1, 2], object(), int, torch.float32, torch.int64, torch.device("cpu"), 1j,
    np.float64(0.5), np.int64(1), np.zeros(2),
)  # fmt: skip

# In the place of what holds several tensors.
GROUPS = (
    Rotary(None, None), RowRng(0, None, None, None), Head(None, None, None, None), [None], (None,) * 8,
    Head(None, torch.zeros(2, 2), torch.zeros(2), torch.zeros(1, 2, 2)), [torch.zeros(2)], torch.zeros(2, 2),
    {"a": 1}, (1, 2, 3), (torch.zeros(1),), BlockWeights(*[None] * 8), [BlockWeights(*[None] * 8)],
)  # fmt: skip
_NOT_OURS = (
    "incompatible function arguments", "object has no", "unpack", "iterable", "not subscriptable", "zip()",
    "unexpected keyword",
)  # fmt: skip


def _garbage_tensor(like: Tensor, draw: Draw) -> Tensor:
    """A tensor that is not what is expected, and may be nearly."""
    if like.layout != torch.strided or like.is_meta:  # garbage already
        return torch.empty(0, dtype=like.dtype)
    way = draw.random.randrange(12)
    plain = like.detach()
    if way == 0:
        return plain.to(
            draw.one(torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.int8)
        )
    if way == 1:
        return plain.to("meta")
    if way == 2:
        return plain[None]
    if way == 3 and plain.ndim:
        return plain[..., :0]
    if way == 4 and plain.ndim:
        return torch.cat((plain, plain), dim=draw.random.randrange(plain.ndim))
    if way == 5 and plain.ndim:
        return plain.sum(dim=0)
    if way == 6 and plain.ndim and plain.dtype != torch.bool:
        return plain.to_sparse()
    if way == 7:
        return torch.empty(0, dtype=plain.dtype)
    if way == 8:
        return torch.tensor(1.5)
    if way == 9 and not plain.is_floating_point() and plain.numel() and plain.dtype != torch.bool:
        changed = plain.contiguous().clone()
        value = torch.tensor(draw.one(-1, 2**62, -(2**63), 2**40)).to(plain.dtype)  # may be narrow by now
        changed.view(-1)[draw.random.randrange(plain.numel())] = value
        return changed
    if way == 10 and plain.dtype == torch.bool:
        return torch.zeros_like(plain)
    return plain.transpose(0, -1) if plain.ndim > 1 else plain.to(torch.float8_e4m3fn)


def bad_arguments(problem: Problem, draw: Draw) -> Counter[str]:
    """One or two arguments are replaced: the call works, or raises ValueError or TypeError; nothing else."""
    if draw.chance(0.4):
        return _bad_groups(problem, draw)
    leaves, given = dict(problem.leaves), dict(problem.given)
    for _ in range(draw.one(1, 1, 2)):
        where = draw.one(leaves, given, given) if given else leaves
        name = draw.one(*where)
        value = where[name]
        if isinstance(value, Tensor) and draw.chance(0.8):
            where[name] = _garbage_tensor(value, draw)
        else:
            where[name] = draw.one(*GARBAGE)
    told = ", ".join(f"{k}={_short(v)}" for k, v in {**leaves, **given}.items())
    changed = problem._replace(leaves=leaves, given=given)
    return _refused(lambda: OPS[problem.op].call(changed), f"{problem.op}({told})", draw)


def _refused(call: Callable[[], object], told: str, draw: Draw) -> Counter[str]:
    counts: Counter[str] = Counter()
    for isa in (None, draw.one(*ops.instruction_sets())):
        with ops.instruction_set(isa):
            try:
                call()
                counts["bad calls that were none"] += 1
            except (ValueError, TypeError) as error:
                _check_message(error)
                counts["bad calls refused"] += 1
            except Exception as error:
                raise Wrong(f"{told}: {type(error).__name__}: {error}") from error
    return counts


def _bad_groups(problem: Problem, draw: Draw) -> Counter[str]:
    """An argument of the op itself, which may be a list or a tuple of tensors, is replaced by anything."""
    op, called = getattr(lk, problem.op), []

    def record(*args: Any, **options: Any) -> Any:
        called.append((list(args), options))
        return op(*args, **options)

    with mock.patch.object(lk, problem.op, record):
        OPS[problem.op].call(problem)
    args, options = called[0]
    place: Any = draw.one(*options) if options and draw.chance(0.5) else draw.random.randrange(len(args))
    where: Any = options if isinstance(place, str) else args
    where[place] = draw.one(*GARBAGE, *GROUPS)
    told = f"{problem.op}, argument {place} = {_short(where[place])}"
    return _refused(lambda: op(*args, **options), told, draw)


def _short(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def _check_message(error: Exception) -> None:
    """A refusal of ours is one of `argument: got ..., expected ...`, not one of the binding or of Python."""
    text = str(error)
    if any(words in text for words in _NOT_OURS):
        raise Wrong(f"a refusal that names no argument: {text[:200]}")


def not_numbers(problem: Problem, draw: Draw) -> Counter[str]:
    """NaN in one place: NaN where float64 has it, and the same bits elsewhere as without it."""
    names = [name for name, leaf in problem.leaves.items() if leaf.numel()]
    name = draw.one(*names)
    leaves = dict(problem.leaves)
    leaves[name] = leaves[name].clone()
    leaves[name].view(-1)[draw.random.randrange(leaves[name].numel())] = math.nan
    given = {k: None if k == "exit_threshold" else v for k, v in problem.given.items()}
    clean, spoilt = problem._replace(given=given), problem._replace(leaves=leaves, given=given)
    draws = problem.op == "sample_rows"
    with lk.use_backend("reference"):
        oracle = ops.results(ops.in_float64(spoilt) if not draws else spoilt, ())
    counts: Counter[str] = Counter()
    if not ops.on_kernels(problem):
        return counts
    for isa in ops.instruction_sets():
        with ops.instruction_set(isa):
            first, out = ops.results(clean, ()), ops.results(spoilt, ())
        counts[f"{problem.op} calls"] += 2
        for key, value in out.items():
            if not value.is_floating_point():
                continue
            if not torch.equal(value.isnan(), oracle[key].isnan()):
                raise Wrong(
                    f"{isa}: NaN in {name}, {key}: NaN at other places than in float64\n{spoilt.describe()}"
                )
            fine = ~value.isnan()
            if key != "total" and not torch.equal(value[fine], first[key][fine]):
                raise Wrong(f"{isa}: NaN in {name} changes {key} where it is a number\n{spoilt.describe()}")
    return counts


def extreme_values(draw: Draw) -> Counter[str]:
    """Scores and rows beyond what fp32 resolves: right or not finite, never wrong in silence."""
    counts: Counter[str] = Counter()
    length, size = draw.size(1, 2, 5, 8, 17, rare=(300,)), draw.one(30.0, 1e3, 3e4, 1e9, 1e15, 1e18)
    shape = (draw.size(1, 2), 1, length, draw.size(2, 8, 64))
    q, k, v = (torch.randn(shape, generator=draw.generator) for _ in range(3))
    mask = draw.mask(shape[0], length)
    hidden = torch.randn(1, 3, draw.size(2, 16, 30), generator=draw.generator)
    width = hidden.shape[-1]
    head = Head(
        1 + 0.1 * torch.randn(width, generator=draw.generator),
        *(torch.randn(s, generator=draw.generator) for s in ((20, width), (20,), (1, 2, width))),
        draw.one(-1, 7),
    )
    scale = draw.one(0.0, 1e-30, 1e10, 1e18, 1e19, 1e30, 1e38)
    large = hidden.clone()
    large[0, 0] *= scale
    exact = lk.head_logits(large.double(), head._replace(**{n: getattr(head, n).double() for n in _TENSORS}))
    for isa in ops.instruction_sets():
        with ops.instruction_set(isa):
            _check_attention(q * size, k * size, v, mask, f"{isa}: attention, |q| = |k| ~ {size:g}")
            got, rest = lk.head_logits(large, head), lk.head_logits(hidden, head)
            wrong = (got - exact).abs().amax(dim=-1) > 1e-3 * (1 + exact.abs().amax(dim=-1))
            if bool((wrong & got.isfinite().all(dim=-1)).any()) or not torch.equal(got[0, 1:], rest[0, 1:]):
                raise Wrong(f"{isa}: head_logits, a row times {scale:g}, D = {width}")
            counts["extreme calls"] += 3
    return counts


_TENSORS = ("norm", "weight", "bias", "modulation")


def _check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, what: str) -> None:
    out = lk.attention(q, k, v, key_mask=mask)
    keys = torch.ones(v.shape[0], v.shape[2], dtype=torch.bool) if mask is None else mask
    kept = keys[:, None, :, None]
    low = v.masked_fill(~kept, math.inf).amin(dim=2, keepdim=True)
    high = v.masked_fill(~kept, -math.inf).amax(dim=2, keepdim=True)
    slack = 1e-5 * (1 + high.abs() + low.abs())
    if not bool(((out >= low - slack) & (out <= high + slack)).all()):
        raise Wrong(f"{what}: outside of the values it is a mean of")
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~keys[:, None, None, :], -math.inf)
    top = scores.topk(min(2, scores.shape[-1]), dim=-1)
    gap = top.values[..., 0] - top.values[..., -1] if scores.shape[-1] > 1 else scores[..., 0] * 0 + math.inf
    # fp32 scores are off by 2^-18 of the largest or so: keys closer than that may change places
    clear = gap > 40 + 2.0**-18 * scores.abs().masked_fill(~scores.isfinite(), 0).amax(dim=-1)
    want = v.gather(2, top.indices[..., :1].expand_as(v))
    if not torch.allclose(out[clear], want[clear], rtol=1e-5, atol=1e-5):
        raise Wrong(f"{what}: not the value of the key that takes all")
