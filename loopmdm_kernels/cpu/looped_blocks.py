"""`looped_blocks` on the CPU: float32 or bfloat16 products, float32 sums and residual stream."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.cpu.packing import packed_linear
from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.types import BlockWeights, Rotary

_DTYPES = (torch.float32, torch.bfloat16)
_TENSORS = len(BlockWeights._fields)
_MAX_ELEMENTS = 2**34  # of x with dropout: its masks count groups of four in 32 bits


def supports(
    *,
    x: Tensor,
    blocks: Sequence[BlockWeights],
    num_loops: int | Tensor,
    num_heads: int | None = None,
    compute_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    exit_threshold: float | None = None,
) -> str | None:
    """Why these arguments need another backend, or None."""
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    if (compute_dtype or blocks[0].qkv.dtype) not in _DTYPES:
        return f"compute_dtype must be float32 or bfloat16, got {compute_dtype or blocks[0].qkv.dtype}"
    for weights in blocks:
        for name, weight in zip(BlockWeights._fields, weights, strict=True):
            if weight.dtype not in _DTYPES:
                return f"{name} must be float32 or bfloat16, got {weight.dtype}"
    if dropout and (isinstance(num_loops, Tensor) or exit_threshold is not None):
        return "with dropout every sequence must have the same number of loops"
    if dropout and x.numel() > _MAX_ELEMENTS:
        return f"with dropout x may have {_MAX_ELEMENTS} elements, got {x.numel()}"
    return None


class _Options(NamedTuple):
    """What both directions need beside tensors that have gradients."""

    num_heads: int
    cos: Tensor | None
    sin: Tensor | None
    key_mask: Tensor | None
    bf16: bool
    dropout: float
    dropout_seed: int


def looped_blocks(
    x: Tensor,
    blocks: Sequence[BlockWeights],
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
    reason = supports(
        x=x,
        blocks=blocks,
        num_loops=num_loops,
        compute_dtype=compute_dtype,
        dropout=dropout,
        exit_threshold=exit_threshold,
    )
    if reason is not None:
        raise ValueError(f"looped_blocks on the CPU: {reason}")
    loops = num_loops if isinstance(num_loops, Tensor) else torch.full((x.shape[0],), num_loops)
    cos, sin = (None, None) if rotary is None else (_vector(angle) for angle in rotary)
    options = _Options(
        num_heads,
        cos,
        sin,
        None if key_mask is None else key_mask.contiguous(),
        (compute_dtype or blocks[0].qkv.dtype) == torch.bfloat16,
        dropout,
        dropout_seed,
    )
    weights = [weight for block in blocks for weight in block]
    threshold = -1.0 if exit_threshold is None else exit_threshold
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, modulation, *weights)):
        out, used = _LoopedBlocks.apply(  # type: ignore[no-untyped-call]
            x, modulation, loops, options, threshold, recompute, *weights
        )
    else:
        out, used = _forward(x, weights, modulation, loops.contiguous(), options, threshold)
    return out if exit_threshold is None else (out, used)


def _vector(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().float().contiguous()


def _packed(weights: Sequence[Tensor], options: _Options) -> list[Tensor]:
    """The tensors of all blocks as the kernel reads them."""
    tensors: list[Tensor] = []
    for i in range(0, len(weights), _TENSORS):
        b = BlockWeights(*weights[i : i + _TENSORS])
        bf16 = options.bf16
        tensors += [
            _vector(b.norm1),
            packed_linear(b.qkv, bf16=bf16, heads=options.num_heads, parts=3),
            packed_linear(b.attn_out, bf16=bf16),
            _vector(b.norm2),
            packed_linear(b.mlp_in, bf16=bf16),
            _vector(b.mlp_in_bias),
            packed_linear(b.mlp_out, bf16=bf16),
            _vector(b.mlp_out_bias),
        ]
    return tensors


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    modulation: Tensor,
    loops: Tensor,
    options: _Options,
    threshold: float = -1.0,
    first_loop: int = 0,
    loop_inputs: Tensor | None = None,
    records: Tensor | None = None,
    packed: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    from loopmdm_kernels import _C

    x = x.detach().contiguous()
    out, used = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.int64)
    _C.looped_blocks(
        x,
        _packed(weights, options) if packed is None else packed,
        _vector(modulation),
        loops,
        *options,
        first_loop,
        threshold,
        torch.get_num_threads(),
        out,
        used,
        loop_inputs,
        records,
    )
    return out, used


class _Gradients(NamedTuple):
    """Accumulators of one block; weights are [out, in padded to whole vectors]."""

    qkv: Tensor
    attn_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    mlp_in_bias: Tensor
    mlp_out_bias: Tensor
    modulation: Tensor  # [M, 6, D]; of the gains (1 + scale) * norm in place of the scales

    @classmethod
    def zeros(cls, block: BlockWeights, modulation_rows: int) -> _Gradients:
        from loopmdm_kernels import _C

        def like(weight: Tensor) -> Tensor:
            return torch.zeros(weight.shape[0], _C.padded_columns(weight.shape[1]), dtype=torch.float32)

        hidden = block.norm1.shape[0]
        return cls(
            like(block.qkv),
            like(block.attn_out),
            like(block.mlp_in),
            like(block.mlp_out),
            torch.zeros(block.mlp_in_bias.shape[0], dtype=torch.float32),
            torch.zeros(hidden, dtype=torch.float32),
            torch.zeros(modulation_rows, 6, hidden, dtype=torch.float32),
        )

    def finish(self, block: BlockWeights, modulation: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients in the order of BlockWeights, and of this block's modulation [M, 6, D]."""
        of_modulation = self.modulation
        norms = []
        for scale, norm in ((1, block.norm1), (4, block.norm2)):
            gain = of_modulation[:, scale].clone()
            norms.append((gain * (1 + modulation[:, scale].float())).sum(dim=0))
            of_modulation[:, scale] = gain * norm.detach().float()
        in_order = BlockWeights(
            norms[0],
            self.qkv,
            self.attn_out,
            norms[1],
            self.mlp_in,
            self.mlp_in_bias,
            self.mlp_out,
            self.mlp_out_bias,
        )
        return [
            (g if g.ndim == 1 else g[:, : w.shape[1]]).to(w.dtype)
            for g, w in zip(in_order, block, strict=True)
        ], of_modulation


class _LoopedBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        modulation: Tensor,
        loops: Tensor,
        options: _Options,
        threshold: float,
        recompute: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        most, num_blocks = int(loops.max()), len(weights) // _TENSORS
        loop_inputs = torch.empty(most, *x.shape, dtype=torch.float32) if recompute else None
        memory = None if recompute else _RecordMemory(_record_shape(x, weights, options, most * num_blocks))
        out, used = _forward(
            x,
            weights,
            modulation,
            loops.contiguous(),
            options,
            threshold,
            loop_inputs=loop_inputs,
            records=None if memory is None else memory.records,
        )
        ctx.mark_non_differentiable(used)
        ctx.save_for_backward(x, modulation, used, *weights)
        ctx.options, ctx.loop_inputs, ctx.record_memory = options, loop_inputs, memory
        return out, used

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, modulation, used, *weights = ctx.saved_tensors
        options: _Options = ctx.options
        blocks = [BlockWeights(*weights[i : i + _TENSORS]) for i in range(0, len(weights), _TENSORS)]
        gradients = [_Gradients.zeros(block, modulation.shape[1]) for block in blocks]
        packed = _packed(weights, options)
        grad = grad.resolve_neg().float().clone(memory_format=torch.contiguous_format)
        transposed = [
            packed_linear(weight, bf16=options.bf16, transposed=True)
            for block in blocks
            for weight in (block.qkv, block.attn_out, block.mlp_in, block.mlp_out)
        ]

        def run(first_loop: int, loops: Tensor, records: Tensor) -> None:
            from loopmdm_kernels import _C

            _C.looped_blocks_backward(
                grad,
                packed,
                transposed,
                _vector(modulation),
                loops,
                *options,
                first_loop,
                torch.get_num_threads(),
                records,
                [tensor for gradient in gradients for tensor in gradient],
            )

        most = int(used.max())  # fewer than were allowed where every sequence stopped early
        if ctx.record_memory is not None:
            run(0, used, ctx.record_memory.records[: most * len(blocks)])
        else:
            memory = _RecordMemory(_record_shape(x, weights, options, len(blocks)))
            for loop in reversed(range(most)):
                once = (used > loop).long()
                _forward(
                    ctx.loop_inputs[loop],
                    weights,
                    modulation,
                    once,
                    options,
                    first_loop=loop,
                    records=memory.records,
                    packed=packed,
                )
                run(loop, once, memory.records)
        grad_weights: list[Tensor] = []
        grad_modulation = torch.empty_like(modulation)
        for index, (block, gradient) in enumerate(zip(blocks, gradients, strict=True)):
            of_block, of_modulation = gradient.finish(block, modulation[index].detach())
            grad_weights += of_block
            grad_modulation[index] = of_modulation
        return grad, grad_modulation, None, None, None, None, *grad_weights


def _record_shape(
    x: Tensor, weights: Sequence[Tensor], options: _Options, applications: int
) -> tuple[int, ...]:
    from loopmdm_kernels import _C

    batch, length, hidden = x.shape
    width = BlockWeights(*weights[:_TENSORS]).mlp_in.shape[0]
    return applications, batch, _C.record_bytes(length, hidden, width, options.num_heads, options.bf16)


class _RecordMemory:
    """Memory for the records of one forward pass; goes back to the spare ones when the graph is gone.

    A training step touches hundreds of MB of records. Fresh memory for each would be cleared by the system
    first, a tenth of the step.
    """

    _spare: ClassVar[list[Tensor]] = []
    _lock: ClassVar[threading.RLock] = threading.RLock()  # collection may run inside

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = math.prod(shape)
        with self._lock:
            fitting = [i for i, spare in enumerate(self._spare) if spare.numel() >= size]
            if fitting:
                self._memory = self._spare.pop(min(fitting, key=lambda i: self._spare[i].numel()))
            else:
                if self._spare:  # too small: larger ones take their place
                    self._spare.pop(0)
                self._memory = torch.empty(size, dtype=torch.uint8)
        self.records = self._memory[:size].view(shape)

    def __del__(self) -> None:
        memory = self.__dict__.pop("_memory", None)  # missing where there was no memory for it
        if memory is not None:
            with self._lock:
                self._spare.append(memory)


def release_spare_memory() -> None:
    """Return to the system the memory that training steps keep for the next one."""
    with _RecordMemory._lock:
        _RecordMemory._spare.clear()
