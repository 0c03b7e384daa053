"""A stack of transformer blocks applied S times with shared weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import differentiable, register, register_autograd, register_flops
from loopmdm_kernels.tracing import traced
from loopmdm_kernels.types import FP8, BlockWeights, Fp8BlockWeights, Fp8Weight, Rotary

_LIMIT_OF_LOOPS = 2**30  # names of dropout's random numbers count applications in 32 bits


def looped_blocks(
    x: Tensor,
    blocks: Sequence[BlockWeights | Fp8BlockWeights],
    modulation: Tensor,
    num_loops: int | Tensor,
    *,
    num_heads: int,
    max_loops: int | None = None,
    rotary: Rotary | None = None,
    key_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor = 0,
    exit_threshold: float | None = None,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply n adaLN blocks S times: H(k) = mid(H(k-1)), k = 1..S (LoopMDM; S = 1 is a plain stack).

    Args:
        x: [B, L, D] float32 or float64, the residual stream H(0); it stays in this dtype.
        blocks: n >= 1 blocks of equal shapes; linear weights [out, in] in any float dtype. For inference
            they may be `Fp8BlockWeights`, all of them.
        modulation: [n, 1 or B, 6, D]: shift, scale, gate of attention, then of the MLP, for each block.
        num_loops: S >= 1 for all sequences, an int or int64 [1] on the CPU (what a compiled graph draws); or
            int64 [B] with one S each.
        num_heads: H; D is a multiple of 2H.
        max_loops: with one S each, none is larger; else S must be read from the device, which waits for it.
        rotary: angles applied to q and k; None: no positions here.
        key_mask: [B, L] bool, True at keys that may be attended; None: all.
        compute_dtype: dtype of the matrix products; None: that of the weights, unless these are fp8.
        dropout: rate on both branch outputs before the gate; masks are a function of `dropout_seed`,
            a number or an int64 tensor [1] on the CPU.
        exit_threshold: stop a sequence after loop k when ||H(k) - H(k-1)|| / ||H(k)|| (Frobenius norms of the
            sequence) is below it, at the latest after `num_loops`.
        recompute: keep only the loop inputs for backward and compute the rest again.

    Returns:
        H(S) [B, L, D]; with `exit_threshold`, also the loops used by each sequence, int64 [B].

    Raises:
        TypeError, ValueError: naming the argument, what was got and what is accepted.
    """
    num_heads = checks.integer("num_heads", num_heads, 1, None, "an int >= 1")
    if not isinstance(num_loops, Tensor):
        num_loops = checks.integer(
            "num_loops",
            num_loops,
            1,
            _LIMIT_OF_LOOPS,
            "at least 1 and below 2^30, an int or an int64 tensor [B]",
        )
    if max_loops is not None:
        max_loops = checks.integer("max_loops", max_loops, 1, None, "None or an int >= 1")
    if not isinstance(dropout_seed, Tensor):
        dropout_seed = checks.seed("dropout_seed", dropout_seed)
    dropout, exit_threshold = checks.dropout(dropout), checks.exit_threshold(exit_threshold)
    _check(x, blocks, modulation, num_loops, max_loops, num_heads, rotary, key_mask, compute_dtype)
    x, blocks, modulation, num_loops, rotary = checks.plain((x, blocks, modulation, num_loops, rotary))
    cos, sin = rotary or (None, None)
    if traced(x):
        loops, per_sequence = (1, num_loops) if isinstance(num_loops, Tensor) else (num_loops, None)
        seed, drawn_seed = (0, dropout_seed) if isinstance(dropout_seed, Tensor) else (dropout_seed, None)
        out, used = torch.ops.loopmdm.looped_blocks(
            x,
            _flat(blocks),
            modulation,
            loops,
            per_sequence,
            num_heads,
            cos,
            sin,
            key_mask,
            compute_dtype or blocks[0].qkv.dtype,
            dropout,
            seed,
            exit_threshold,
            drawn_seed,
        )
        return out if exit_threshold is None else (out, used)
    num_loops, dropout_seed = _number(num_loops), int(dropout_seed)
    implementation = _implementation(x, blocks, num_loops, num_heads, compute_dtype, dropout, exit_threshold)
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor | tuple[Tensor, Tensor] = implementation(
            x,
            blocks,
            modulation,
            num_loops,
            num_heads=num_heads,
            max_loops=max_loops,
            rotary=rotary,
            key_mask=key_mask,
            compute_dtype=compute_dtype,
            dropout=dropout,
            dropout_seed=dropout_seed,
            exit_threshold=exit_threshold,
            recompute=recompute,
        )
    return result


def _number(num_loops: int | Tensor) -> int | Tensor:
    """One S for all as a number, where a tensor on the CPU holds it."""
    if isinstance(num_loops, Tensor) and num_loops.shape == (1,) and num_loops.device.type == "cpu":
        return int(num_loops)
    return num_loops


def _implementation(
    x: Tensor,
    blocks: Sequence[BlockWeights | Fp8BlockWeights],
    num_loops: int | Tensor,
    num_heads: int,
    compute_dtype: torch.dtype | None,
    dropout: float,
    exit_threshold: float | None,
) -> Callable[..., Any]:
    return backends.implementation(
        "looped_blocks",
        x.device,
        fp8_weights=isinstance(blocks[0], Fp8BlockWeights),
        x=x,
        blocks=blocks,
        num_loops=num_loops,
        num_heads=num_heads,
        compute_dtype=compute_dtype,
        dropout=dropout,
        exit_threshold=exit_threshold,
    )


def _check(
    x: Tensor,
    blocks: Sequence[BlockWeights | Fp8BlockWeights],
    modulation: Tensor,
    num_loops: int | Tensor,
    max_loops: int | None,
    num_heads: int,
    rotary: Rotary | None,
    key_mask: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> None:
    checks.tensor("x", x, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("x", x)
    batch, length, hidden = x.shape
    if hidden % (2 * num_heads):
        raise ValueError(
            f"num_heads: got {num_heads}, expected a divisor of D = {hidden} with an even head size"
        )
    checks.block_weights(blocks)
    given: Sequence[int] = getattr(blocks[0].mlp_in, "shape", ())  # what is no matrix is refused below
    width = given[0] if len(given) else "F"
    shapes = (
        (hidden,), (3 * hidden, hidden), (hidden, hidden), (hidden,),
        (width, hidden), (width,), (hidden, width), (hidden,),
    )  # fmt: skip
    for index, weights in enumerate(blocks):
        for name, value, shape in zip(BlockWeights._fields, weights, shapes, strict=True):
            checks.matrix(f"blocks[{index}].{name}", value, shape=shape, device=x.device)
    checks.tensor(
        "modulation",
        modulation,
        dtypes=checks.FLOATS,
        shape=(len(blocks), (1, batch), 6, hidden),
        device=x.device,
    )
    if isinstance(num_loops, Tensor):
        one_for_all = num_loops.shape == (1,) and num_loops.device.type == "cpu"
        device = None if one_for_all else x.device
        checks.tensor("num_loops", num_loops, dtypes=(torch.int64,), shape=((1, batch),), device=device)
        checks.in_range("num_loops", num_loops, 1, _LIMIT_OF_LOOPS if max_loops is None else max_loops + 1)
    if max_loops is not None and not isinstance(num_loops, Tensor):
        raise ValueError(f"max_loops: got {max_loops}, expected None where all sequences have one num_loops")
    checks.rotary(rotary, length, hidden // num_heads, x.device)
    checks.key_mask(key_mask, batch, length, x.device)
    checks.compute_dtype(compute_dtype)
    if isinstance(blocks[0], Fp8BlockWeights):
        checks.for_inference("blocks", compute_dtype, x=x, modulation=modulation)


def _flat(blocks: Sequence[BlockWeights | Fp8BlockWeights]) -> list[Tensor]:
    """All tensors; the scale of an fp8 matrix after its values."""
    tensors: list[Tensor] = []
    for weights in blocks:
        for value in weights:
            tensors += value if isinstance(value, Fp8Weight) else (value,)
    return tensors


def _blocks(tensors: Sequence[Tensor]) -> list[BlockWeights] | list[Fp8BlockWeights]:
    """What `_flat` flattened."""
    if not any(tensor.dtype == FP8 for tensor in tensors):
        width = len(BlockWeights._fields)
        return [BlockWeights(*tensors[i : i + width]) for i in range(0, len(tensors), width)]
    rest = iter(tensors)
    values: list[Any] = [Fp8Weight(t, next(rest)) if t.dtype == FP8 else t for t in rest]
    width = len(Fp8BlockWeights._fields)
    return [Fp8BlockWeights(*values[i : i + width]) for i in range(0, len(values), width)]


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    modulation: Tensor,
    num_loops: int,
    loops_per_sequence: Tensor | None,
    num_heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    compute_dtype: torch.dtype,
    dropout: float,
    dropout_seed: int,
    exit_threshold: float | None,
    drawn_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op behind the operator: flat weights in, always the loops used out."""
    loops = _number(num_loops if loops_per_sequence is None else loops_per_sequence)
    blocks = _blocks(weights)
    result = _implementation(x, blocks, loops, num_heads, compute_dtype, dropout, exit_threshold)(
        x,
        blocks,
        modulation,
        loops,
        num_heads=num_heads,
        rotary=None if cos is None or sin is None else Rotary(cos, sin),
        key_mask=key_mask,
        compute_dtype=compute_dtype,
        dropout=dropout,
        dropout_seed=dropout_seed if drawn_seed is None else int(drawn_seed),
        exit_threshold=exit_threshold,
        recompute=True,
    )
    if exit_threshold is not None:
        out, used = result
        return out, used
    if isinstance(loops, Tensor):
        return result, loops.clone()
    return result, torch.full((x.shape[0],), loops, dtype=torch.int64, device=x.device)


def _forward_run(*args: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _run(*args)


def _backward_run(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], modulation: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Run the loops again, keeping their inputs, and differentiate."""
    with differentiable():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights, modulation)]
        out, _ = _run(leaves[0], leaves[1:-1], leaves[-1], *rest)
        grad_x, *grad_weights, grad_modulation = torch.autograd.grad(out, leaves, grad)
    return grad_x, grad_weights, grad_modulation


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int64)


def _backward_fake(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], modulation: Tensor, *_: Any
) -> tuple[Tensor, list[Tensor], Tensor]:
    return torch.empty_like(x), [torch.empty_like(weight) for weight in weights], torch.empty_like(modulation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, modulation, num_loops, loops, num_heads, cos, sin, key_mask, *options, drawn_seed = inputs
    ctx.save_for_backward(x, *weights, modulation, loops, cos, sin, key_mask, drawn_seed)
    ctx.num_loops, ctx.num_heads, ctx.options = num_loops, num_heads, options


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, *weights, modulation, loops, cos, sin, key_mask, drawn_seed = ctx.saved_tensors
    options = (*ctx.options, drawn_seed)
    grads = torch.ops.loopmdm.looped_blocks_backward(
        grad, x, weights, modulation, ctx.num_loops, loops, ctx.num_heads, cos, sin, key_mask, *options
    )
    return (*grads, *(None for _ in range(11)))


_ARGUMENTS = (
    "Tensor x, Tensor[] weights, Tensor modulation, SymInt num_loops, Tensor? loops_per_sequence, "
    "int num_heads, Tensor? cos, Tensor? sin, Tensor? key_mask, ScalarType compute_dtype, float dropout, "
    "SymInt dropout_seed, float? exit_threshold, Tensor? drawn_seed"
)
register(f"looped_blocks({_ARGUMENTS}) -> (Tensor, Tensor)", _forward_run, _fake)
register(
    f"looped_blocks_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor[], Tensor)",
    _backward_run,
    _backward_fake,
)
register_autograd("looped_blocks", _backward, _setup_context)


def _flops(
    x: Tensor,
    weights: Sequence[Tensor],
    modulation: Tensor,
    num_loops: int,
    loops_per_sequence: Tensor | None,
    *_: Any,
    out_val: Any = None,
) -> int:
    """Of the loops that the sequences took, where an exit ended them early too."""
    batch, length, hidden = x.shape
    used: Tensor | None = loops_per_sequence if out_val is None else out_val[1]
    loops = batch * num_loops if used is None or traced(used) else int(used.sum()) * batch // len(used)
    matrices = sum(weight.numel() for weight in weights if weight.ndim == 2)
    return loops * (2 * length * matrices + modulation.shape[0] * 4 * length * length * hidden)


register_flops("looped_blocks", _flops)
