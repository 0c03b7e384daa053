"""A stack of transformer blocks applied S times with shared weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import Operator
from loopmdm_kernels.tracing import traced
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Rotary

_LIMIT_OF_LOOPS = 2**30  # names of dropout's random numbers count applications in 32 bits
_ACCEPTED_LOOPS = "at least 1 and below 2^30, an int or an int64 tensor [B]"


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
    if not isinstance(num_loops, Tensor):
        num_loops = checks.integer("num_loops", num_loops, 1, _LIMIT_OF_LOOPS, _ACCEPTED_LOOPS)
    if max_loops is not None:
        max_loops = checks.integer("max_loops", max_loops, 1, None, "None or an int >= 1")
    if not isinstance(dropout_seed, Tensor):
        dropout_seed = checks.seed("dropout_seed", dropout_seed)
    call = LoopedCall(
        x,
        blocks,
        modulation,
        num_loops,
        checks.integer("num_heads", num_heads, 1, None, "an int >= 1"),
        max_loops,
        rotary,
        key_mask,
        compute_dtype,
        checks.dropout(dropout),
        dropout_seed,
        checks.exit_threshold(exit_threshold),
        recompute,
    )
    _check(call)
    out, used = OPERATOR(checks.plain(call))
    return out if exit_threshold is None else (out, used)


def _check(call: LoopedCall) -> None:
    x, num_loops = call.x, call.num_loops
    checks.tensor("x", x, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("x", x)
    batch, length, hidden = x.shape
    if hidden % (2 * call.num_heads):
        raise ValueError(
            f"num_heads: got {call.num_heads}, expected a divisor of D = {hidden} with an even head size"
        )
    checks.block_weights(call.blocks)
    given: Sequence[int] = getattr(call.blocks[0].mlp_in, "shape", ())  # what is no matrix is refused below
    width = given[0] if len(given) else "F"
    shapes = (
        (hidden,), (3 * hidden, hidden), (hidden, hidden), (hidden,),
        (width, hidden), (width,), (hidden, width), (hidden,),
    )  # fmt: skip
    for index, weights in enumerate(call.blocks):
        for name, value, shape in zip(BlockWeights._fields, weights, shapes, strict=True):
            checks.matrix(f"blocks[{index}].{name}", value, shape=shape, device=x.device)
    modulation_shape = (len(call.blocks), (1, batch), 6, hidden)
    checks.tensor(
        "modulation", call.modulation, dtypes=checks.FLOATS, shape=modulation_shape, device=x.device
    )
    if isinstance(num_loops, Tensor):
        one_for_all = num_loops.shape == (1,) and num_loops.device.type == "cpu"
        device = None if one_for_all else x.device
        numbers = (1, batch) if num_loops.device.type == "cpu" else batch
        checks.tensor("num_loops", num_loops, dtypes=(torch.int64,), shape=(numbers,), device=device)
        most = _LIMIT_OF_LOOPS if call.max_loops is None else call.max_loops + 1
        checks.in_range("num_loops", num_loops, 1, most)
    elif call.max_loops is not None:
        raise ValueError(
            f"max_loops: got {call.max_loops}, expected None where all sequences have one num_loops"
        )
    checks.rotary(call.rotary, length, call.head_dim, x.device)
    checks.key_mask(call.key_mask, batch, length, x.device)
    checks.compute_dtype(call.compute_dtype)
    if call.fp8:
        checks.for_inference("blocks", call.compute_dtype, x=x, modulation=call.modulation)


def _run(call: LoopedCall) -> tuple[Tensor, Tensor | None]:
    out, used = backends.run("looped_blocks", call.read())
    return out, used


def _loops_used(call: LoopedCall, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """The outputs of the operator, always with the loops that each sequence took."""
    out, used = outputs
    if call.exit_threshold is not None and used is not None:
        return out, used
    loops = call.read().num_loops
    if isinstance(loops, Tensor):
        return out, loops.clone()
    return out, torch.full((len(out),), loops, dtype=torch.int64, device=out.device)


def _flops(call: LoopedCall, outputs: tuple[Tensor, Tensor] | None) -> int:
    """Of the loops that the sequences took, where an exit ended them early too."""
    batch, length, hidden = call.x.shape
    used = call.num_loops if outputs is None else outputs[1]
    if not isinstance(used, Tensor) or traced(used):
        loops = batch * (1 if isinstance(call.num_loops, Tensor) else call.num_loops)
    else:
        loops = int(used.sum()) * batch // len(used)
    matrices = sum(weight.numel() for weight in call.weights if weight.ndim == 2)
    return loops * (2 * length * matrices + len(call.blocks) * 4 * length * length * hidden)


OPERATOR = Operator(
    LoopedCall,
    "looped_blocks(Tensor x, Tensor[] weights, Tensor modulation, SymInt num_loops, "
    "Tensor? loops_per_sequence, int num_heads, Tensor? cos, Tensor? sin, Tensor? key_mask, "
    "ScalarType compute_dtype, float dropout, SymInt dropout_seed, float? exit_threshold, "
    "Tensor? drawn_seed) -> (Tensor, Tensor)",
    fake=lambda call: (torch.empty_like(call.x), call.x.new_empty(call.x.shape[0], dtype=torch.int64)),
    flops=_flops,
    run=_run,
    traced=_loops_used,
    leaves=(0, 1, 2),
)
