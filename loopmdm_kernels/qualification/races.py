"""How long backends take beside plain PyTorch, eager and compiled, at a few sizes; and whether they are right
there too, where they have more tiles than in the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels.backends import Refused, kernel
from loopmdm_kernels.calls import (
    AttentionCall,
    Call,
    CrossEntropyCall,
    Draw,
    HeadCall,
    LoopedCall,
    SampleCall,
    apart,
    together,
)
from loopmdm_kernels.qualification.cases import DOUBLE, Results, by_the_rule
from loopmdm_kernels.testing.generators import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.testing.timers import interleaved_medians
from loopmdm_kernels.types import BlockWeights, Head

EAGER, COMPILED = "eager", "compiled"
REPEATS = 7
# Times the error of plain PyTorch: the rule is for the checks, and a wrong tile is far off.
_FAR = 8.0
# Of the small model on a GPU, of a smaller one on a CPU: hidden size, heads, vocabulary, loops.
_WIDTHS = {"cuda": (768, 12, 50_258, 4), "cpu": (256, 4, 8192, 2)}
# (B, L) of blocks; rows of the head.
_SEQUENCES = {"cuda": ((1, 128), (1, 1024), (8, 1024)), "cpu": ((1, 81), (4, 128))}
_ROWS = {"cuda": (64, 1024), "cpu": (16, 128)}


def race(
    backends: Sequence[str], op: str, direction: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """{"seconds": {size: {backend or eager: median}}, "wrong": {backend: why}}; they take turns."""
    seconds: dict[str, dict[str, float]] = {}
    wrong: dict[str, str] = {}
    for size, call in calls(op, dtype, device, gradients=direction == "gradients"):
        with lk.use_backend("reference"):
            plain, exact = _results(call), _results(_in_float64(call))
        variants: dict[str, Callable[[], Any]] = {}
        for name in backends:
            try:
                with lk.use_backend(name):
                    out = _results(call)
                by_the_rule(out, plain, exact, factor=_FAR)
            except Refused:
                continue
            except AssertionError as error:
                wrong.setdefault(name, f"{size}: {error}")
            variants[name] = partial(_on, name, call)
        variants[EAGER] = partial(_on, "reference", call)
        seconds[size] = interleaved_medians(variants, repeats=REPEATS)
    return {"seconds": seconds, "wrong": wrong}


def compiled_race(
    op: str, direction: str, dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median seconds of compiled PyTorch beside eager, at the last size: each one is compiled for itself."""
    *_, (size, call) = calls(op, dtype, device, gradients=direction == "gradients")
    run = torch.compile(kernel("reference", op), dynamic=False)
    variants: dict[str, Callable[[], Any]] = {
        COMPILED: partial(_run, run, call),
        EAGER: partial(_on, "reference", call),
    }
    return {size: interleaved_medians(variants, repeats=REPEATS)}


def calls(
    op: str, dtype: torch.dtype, device: torch.device, *, gradients: bool
) -> Iterator[tuple[str, Call]]:
    """(size, call), whose leaves have gradients if wanted; the last is the largest."""
    hidden_size, heads, vocab_size, num_loops = _WIDTHS[device.type]
    weights = torch.float32 if gradients else dtype

    def leaf(tensor: Tensor, kind: torch.dtype) -> Tensor:
        return tensor.to(device, kind).requires_grad_(gradients)

    if op in ("looped_blocks", "attention"):
        for batch, length in _SEQUENCES[device.type]:
            size = f"B{batch} L{length} D{hidden_size}"
            if op == "attention":
                shape = batch, heads, length, hidden_size // heads
                q, k, v = (leaf(torch.randn(shape), dtype) for _ in range(3))
                yield size, AttentionCall(q, k, v)
                continue
            inputs = looped_inputs(batch, length, hidden_size, heads, 2).to(weights, device=device)
            yield (
                f"{size} S{num_loops}",
                LoopedCall(
                    leaf(inputs.x, torch.float32),
                    [BlockWeights(*(leaf(w, weights) for w in block)) for block in inputs.blocks],
                    leaf(inputs.modulation, weights),
                    num_loops,
                    heads,
                    rotary=inputs.rotary,
                    compute_dtype=dtype,
                ),
            )
        return
    for num_rows in _ROWS[device.type]:
        hidden, head = head_inputs(1, num_rows, hidden_size, vocab_size, excluded_token=vocab_size - 1)
        stream = leaf(hidden, torch.float32)
        norm, weight, bias, modulation = (leaf(t, weights) for t in head.tensors)
        rounded = Head(norm, weight, bias, modulation, head.excluded_token)
        rows = torch.arange(num_rows, device=device)
        size = f"R{num_rows} D{hidden_size} V{vocab_size}"
        if op == "head_logits":
            yield size, HeadCall(stream, rounded._replace(excluded_token=-1), dtype)
        elif op == "masked_cross_entropy":
            targets = torch.zeros(1, num_rows, dtype=torch.int64, device=device)
            yield (
                size,
                CrossEntropyCall(stream, rounded, dtype, targets, rows, torch.ones(num_rows, device=device)),
            )
        else:
            rng = row_rng(num_rows)
            names = (name.to(device) for name in rng[1:])
            yield size, SampleCall(stream, rounded, dtype, rows, Draw(type(rng)(rng.seed, *names)))


def _on(backend: str, call: Call) -> None:
    with lk.use_backend(backend):
        _run(_PUBLIC[type(call)], call)


def _run(run: Callable[[Any], Any], call: Call) -> tuple[Any, tuple[Tensor, ...]]:
    """What it returns, and the gradients that are wanted of its sum."""
    leaves = [leaf for leaf in call.leaves if leaf is not None and leaf.requires_grad]
    if not leaves:
        with torch.no_grad():
            return run(call), ()
    out = run(call)
    result = out if isinstance(out, Tensor) else out[0]
    return out, torch.autograd.grad(result.sum(), leaves)


def _results(call: Call) -> Results:
    """What can be compared: not a sum of many terms, nor what goes by a token that was drawn."""
    out, gradients = _run(_PUBLIC[type(call)], call)
    if isinstance(call, SampleCall):
        return {name: getattr(out, name) for name in ("top1_prob", "top2_prob", "entropy")}
    found = out if isinstance(out, Tensor) else out[1]
    return {"out": found.detach(), **{f"gradient {i}": grad for i, grad in enumerate(gradients)}}


def _in_float64(call: Call) -> Call:
    tensors, rest = apart(call.arguments())
    wide = []
    for tensor in tensors:
        leaf = tensor.detach().to(DOUBLE) if tensor.is_floating_point() else tensor
        wide.append(leaf.requires_grad_(tensor.requires_grad) if leaf is not tensor else tensor)
    same = type(call).of(*together(wide, rest))
    return same if isinstance(same, AttentionCall) else replace(same, compute_dtype=None)  # type: ignore[call-arg]


def _of_head(op: Callable[..., Any], *names: str) -> Callable[[Any], Any]:
    def run(call: Any) -> Any:
        given = [getattr(call, name) for name in names]
        return op(call.hidden, call.head, *given, compute_dtype=call.compute_dtype)

    return run


_PUBLIC: dict[type[Call], Callable[[Any], Any]] = {
    AttentionCall: lambda call: lk.attention(call.q, call.k, call.v),
    LoopedCall: lambda call: lk.looped_blocks(
        *(call.x, call.blocks, call.modulation, call.num_loops),
        num_heads=call.num_heads,
        rotary=call.rotary,
        compute_dtype=call.compute_dtype,
    ),
    HeadCall: _of_head(lk.head_logits),
    CrossEntropyCall: _of_head(lk.masked_cross_entropy, "targets", "rows", "row_weights"),
    SampleCall: lambda call: lk.sample_rows(
        call.hidden, call.head, call.rows, call.draw.rng, compute_dtype=call.compute_dtype
    ),
}
