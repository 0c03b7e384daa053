"""`looped_blocks` in Triton: five launches a block, and no reading of device memory by the host.

(Loop counts of each sequence are the exception: their largest is read once a call, unless `max_loops` is
given.) Sequences that are done stay in the batch: the launches of later loops copy their rows and compute
nothing for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.triton.attention import MAX_HEAD_DIM, angles, mask_bytes
from loopmdm_kernels.triton.block import (
    Exit,
    Options,
    Record,
    Stream,
    block_forward,
    cast_weights,
    fp8_weights,
    residual_columns,
)
from loopmdm_kernels.triton.block_backward import Gradients, block_backward
from loopmdm_kernels.triton.head import OPERANDS
from loopmdm_kernels.triton.kernels.looped_blocks import exit_kernel
from loopmdm_kernels.triton.launch import ceil_div, launch
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Fp8Weight, Rotary

_TENSORS = len(BlockWeights._fields)
_MAX_HIDDEN = 8192  # a row is held in registers where gradients of norms are summed


def supports(
    *,
    x: Tensor,
    blocks: Sequence[BlockWeights | Fp8BlockWeights],
    num_loops: int | Tensor,
    num_heads: int | None = None,
    compute_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    exit_threshold: float | None = None,
) -> str | None:
    """Why these arguments need another backend, or None."""
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    if (compute_dtype or blocks[0].qkv.dtype) not in OPERANDS:
        return (
            f"compute_dtype must be float32, bfloat16 or float16, got {compute_dtype or blocks[0].qkv.dtype}"
        )
    for weights in blocks:
        named: dict[str, Tensor | Fp8Weight] = weights._asdict()
        for name, weight in named.items():
            if weight.dtype not in OPERANDS and not isinstance(weight, Fp8Weight):
                return f"{name} must be float32, bfloat16 or float16, got {weight.dtype}"
    if x.shape[-1] > _MAX_HIDDEN:
        return f"x may be {_MAX_HIDDEN} wide, got {x.shape[-1]}"
    if dropout and (isinstance(num_loops, Tensor) or exit_threshold is not None):
        return "with dropout every sequence must have the same number of loops"
    if dropout and x.shape[-1] % 4:
        return f"with dropout the width of x must be a multiple of 4, got {x.shape[-1]}"
    return None


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
    dropout_seed: int = 0,
    exit_threshold: float | None = None,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = compute_dtype or blocks[0].qkv.dtype
    if x.shape[-1] // num_heads > MAX_HEAD_DIM:
        raise ValueError(
            f"looped_blocks in Triton: the head size may be {MAX_HEAD_DIM}, got {x.shape[-1] // num_heads}"
        )
    options = Options(
        num_heads,
        x.shape[1],
        0 if modulation.shape[1] == 1 else 6 * x.shape[2],
        *angles(rotary, dtype),
        mask_bytes(key_mask),
        dtype,
        dropout,
        dropout_seed,
    )
    plain = [block for block in blocks if isinstance(block, BlockWeights)]
    weights = [weight for block in plain for weight in block]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, modulation, *weights)):
        out, used = _LoopedBlocks.apply(  # type: ignore[no-untyped-call]
            x, modulation, num_loops, max_loops, options, exit_threshold, recompute, *weights
        )
    else:
        ready = cast_weights(plain, dtype) or fp8_weights(blocks, dtype)
        out, used, _, _ = _forward(x, modulation, num_loops, max_loops, options, exit_threshold, ready)
    return out if exit_threshold is None or used is None else (out, used)


def _forward(
    x: Tensor,
    modulation: Tensor,
    num_loops: int | Tensor,
    max_loops: int | None,
    options: Options,
    threshold: float | None,
    blocks: Sequence[BlockWeights | Fp8BlockWeights],
    *,
    keep_starts: bool = False,
    keep_records: bool = False,
) -> tuple[Tensor, Tensor | None, list[Stream], list[Record]]:
    """Result, loops used (None: all of them), and for backward the inputs of the loops or all records."""
    batch, length, hidden = x.shape
    narrow = modulation.detach().to(options.dtype).contiguous()
    if isinstance(num_loops, int):
        max_loops = num_loops
    elif max_loops is None:
        max_loops = int(num_loops.max())
    active = used = limits = change = None
    if threshold is not None or not isinstance(num_loops, int):
        if isinstance(num_loops, int):
            limits = torch.full((batch,), num_loops, dtype=torch.int64, device=x.device)
        else:
            limits = num_loops.to(x.device).contiguous()
        active = torch.ones(batch, dtype=torch.int8, device=x.device)
        used = torch.zeros(batch, dtype=torch.int64, device=x.device)
    if threshold is not None:
        rows, width = batch * length, blocks[-1].mlp_out.shape[1]
        columns = residual_columns(rows, hidden, width, options.dtype, x.device)
        change = x.new_empty(2, rows, ceil_div(hidden, columns))
    stream = Stream.of(x.detach().contiguous().view(-1, hidden))
    starts, records = [], []
    for loop in range(max_loops):
        start = stream
        if keep_starts:
            starts.append(start)
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
                records.append(record)
        if limits is not None:
            launch(
                exit_kernel,
                (batch,),
                change,
                limits,
                active,
                used,
                batch * length,
                length,
                0 if change is None else change.shape[2],
                0.0 if threshold is None else threshold,
                BLOCK=256,
                num_warps=4,
                num_stages=1,
            )
    return stream.x.view(x.shape), used, starts, records


class _LoopedBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        modulation: Tensor,
        num_loops: int | Tensor,
        max_loops: int | None,
        options: Options,
        threshold: float | None,
        recompute: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        blocks = _blocks(weights)
        out, used, starts, records = _forward(
            x,
            modulation,
            num_loops,
            max_loops,
            options,
            threshold,
            cast_weights(blocks, options.dtype),
            keep_starts=recompute,
            keep_records=not recompute,
        )
        if used is not None:
            ctx.mark_non_differentiable(used)
        ctx.save_for_backward(x, modulation, used, *weights)
        ctx.options, ctx.starts, ctx.records = options, starts, records
        return out, used

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        _, modulation, used, *weights = ctx.saved_tensors
        options: Options = ctx.options
        blocks = _blocks(weights)
        cast = cast_weights(blocks, options.dtype)
        narrow = modulation.to(options.dtype).contiguous()
        batch, length, hidden = grad.shape
        sums = [Gradients.zeros(block, batch, length) for block in blocks]
        grad = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(-1, hidden)
        number = len(blocks)
        loops = len(ctx.starts) or len(ctx.records) // number
        for loop in reversed(range(loops)):
            records: list[Record] = ctx.records[loop * number : (loop + 1) * number]
            if ctx.starts:
                stream = ctx.starts[loop]
                for index in range(number):
                    stream, record = block_forward(
                        stream, cast[index], narrow[index], options, loop * number + index, keep=True
                    )
                    assert record is not None
                    records.append(record)
            for index in reversed(range(number)):
                block_backward(
                    grad,
                    records[index],
                    cast[index],
                    narrow[index],
                    options,
                    loop * number + index,
                    loop,
                    used,
                    sums[index],
                )
        grad_weights: list[Tensor] = []
        of_modulation = []
        for block, gradient in zip(blocks, sums, strict=True):
            of_block, of_its_modulation = gradient.finish(block, modulation.shape[1])
            grad_weights += of_block
            of_modulation.append(of_its_modulation)
        grad_modulation = torch.stack(of_modulation).to(modulation.dtype)
        return grad.view(batch, length, hidden), grad_modulation, *[None] * 5, *grad_weights


def _blocks(weights: Sequence[Tensor]) -> list[BlockWeights]:
    return [BlockWeights(*weights[i : i + _TENSORS]) for i in range(0, len(weights), _TENSORS)]
