"""`looped_blocks` in Triton: five launches a block, and no reading of device memory by the host.

(Loop counts of each sequence are the exception: their largest is read once a call, unless `max_loops` is
given.) Sequences that are done stay in the batch: the launches of later loops copy their rows and compute
nothing for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.gradients import Kept, differentiable
from loopmdm_kernels.triton.attention import why_not_heads
from loopmdm_kernels.triton.block import (
    Exit,
    Options,
    Record,
    Stream,
    block_forward,
    cast_weights,
    residual_columns,
)
from loopmdm_kernels.triton.block_backward import Gradients, block_backward
from loopmdm_kernels.triton.kernels.looped_blocks import exit_kernel
from loopmdm_kernels.triton.launch import launch
from loopmdm_kernels.triton.operands import DTYPES, MAX_HIDDEN
from loopmdm_kernels.types import BlockWeights
from loopmdm_kernels.values import ceil_div


def why_not(call: LoopedCall) -> str | None:
    x = call.x
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    if call.dtype not in DTYPES:
        return f"compute_dtype must be float32, bfloat16 or float16, got {call.dtype}"
    for weights in call.blocks:
        for name, weight in weights._asdict().items():
            if isinstance(weight, Tensor) and weight.dtype not in DTYPES:
                return f"{name} must be float32, bfloat16 or float16, got {weight.dtype}"
    if x.shape[-1] > MAX_HIDDEN:
        return f"x may be {MAX_HIDDEN} wide, got {x.shape[-1]}"
    if call.dropout and not call.same_loops:
        return "with dropout every sequence must have the same number of loops"
    if call.dropout and x.shape[-1] % 4:
        return f"with dropout the width of x must be a multiple of 4, got {x.shape[-1]}"
    return why_not_heads(call.head_dim)


def run(call: LoopedCall) -> tuple[Tensor, Tensor | None]:
    if call.trains:
        out, used = differentiable(call, _with_records, _backward)
        return out, used
    out, used, _ = _forward(call)
    return out, used


class Records(NamedTuple):
    """Inputs of the loops, or what every application has kept."""

    starts: list[Stream]
    blocks: list[Record]


def _forward(
    call: LoopedCall, *, keep_starts: bool = False, keep_records: bool = False
) -> tuple[Tensor, Tensor | None, Records]:
    """Result, loops used (None: all of them), and what is kept for backward."""
    batch, length, hidden = call.x.shape
    options, blocks = Options.of(call), cast_weights(call)
    narrow = call.modulation.detach().to(options.dtype).contiguous()
    limits, max_loops = call.num_loops, call.max_loops
    if isinstance(limits, int):
        max_loops = limits
    elif max_loops is None:
        max_loops = int(limits.max())
    active = used = change = None
    if not call.same_loops:
        if isinstance(limits, int):
            limits = torch.full((batch,), limits, dtype=torch.int64, device=call.x.device)
        limits = limits.to(call.x.device).contiguous()
        active = torch.ones(batch, dtype=torch.int8, device=call.x.device)
        used = torch.zeros(batch, dtype=torch.int64, device=call.x.device)
    if call.exit_threshold is not None:
        rows, width = batch * length, blocks[-1].mlp_out.shape[1]
        columns = residual_columns(rows, hidden, width, options.dtype, call.x.device)
        change = call.x.new_empty(2, rows, ceil_div(hidden, columns))
    stream = Stream.of(call.x.detach().contiguous().view(-1, hidden))
    kept = Records([], [])
    for loop in range(max_loops):
        start = stream
        if keep_starts:
            kept.starts.append(start)
        for index, weights in enumerate(blocks):
            last = index == len(blocks) - 1
            stream, record = block_forward(
                stream,
                weights,
                narrow[index],
                options,
                loop * len(blocks) + index,
                active=active,
                exit_to=Exit(start.x, change) if last and change is not None else None,
                keep=keep_records,
            )
            if record is not None:
                kept.blocks.append(record)
        if used is not None:
            launch(
                exit_kernel,
                (batch,),
                *(change, limits, active, used, batch * length, length),
                *(0 if change is None else change.shape[2], call.exit_threshold or 0.0),
                BLOCK=256,
                num_warps=4,
                num_stages=1,
            )
    return stream.x.view(call.x.shape), used, kept


def _with_records(call: LoopedCall, _: Sequence[bool]) -> tuple[tuple[Tensor, Tensor | None], Kept]:
    out, used, kept = _forward(call, keep_starts=call.recompute, keep_records=not call.recompute)
    return (out, used), Kept((used,), kept)


def _backward(call: LoopedCall, kept: Kept, _: Sequence[bool], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    (used,), (starts, every_record) = kept
    options, modulation, number = Options.of(call), call.modulation, len(call.blocks)
    cast: list[BlockWeights] = cast_weights(call)  # type: ignore[assignment]  # fp8 weights do not train
    narrow = modulation.to(options.dtype).contiguous()
    batch, length, hidden = grads[0].shape
    sums = [Gradients.zeros(block, batch, length) for block in cast]
    grad = grads[0].to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(-1, hidden)
    for loop in reversed(range(len(starts) or len(every_record) // number)):
        records: list[Record] = every_record[loop * number : (loop + 1) * number]
        if starts:
            stream = starts[loop]
            for index in range(number):
                application = loop * number + index
                stream, record = block_forward(
                    stream, cast[index], narrow[index], options, application, keep=True
                )
                assert record is not None
                records.append(record)
        for index in reversed(range(number)):
            place = (loop * number + index, loop)
            block_backward(
                grad, records[index], cast[index], narrow[index], options, place, used, sums[index]
            )
    grad_weights: list[Tensor] = []
    of_modulation = []
    for block, gradient in zip(call.plain_blocks, sums, strict=True):
        of_block, of_its_modulation = gradient.finish(block, modulation.shape[1])
        grad_weights += of_block
        of_modulation.append(of_its_modulation)
    grad_modulation = torch.stack(of_modulation).to(modulation.dtype)
    return grad.view(batch, length, hidden), *grad_weights, grad_modulation
