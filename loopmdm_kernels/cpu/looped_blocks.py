"""`looped_blocks` on the CPU: float32 or bfloat16 products, float32 sums and residual stream."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.cpu import gradient_memory
from loopmdm_kernels.cpu.operands import DTYPES, vector
from loopmdm_kernels.cpu.packing import packed_linear, release_stale_memory
from loopmdm_kernels.gradients import Kept, differentiable
from loopmdm_kernels.types import BlockWeights

_MAX_ELEMENTS = 2**34  # of x with dropout: its masks count groups of four in 32 bits


def why_not(call: LoopedCall) -> str | None:
    x = call.x
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    if call.dtype not in DTYPES:
        return f"compute_dtype must be float32 or bfloat16, got {call.dtype}"
    for weights in call.blocks:
        for name, weight in weights._asdict().items():
            if weight.dtype not in DTYPES:
                return f"{name} must be float32 or bfloat16, got {weight.dtype}"
    if call.dropout and not call.same_loops:
        return "with dropout every sequence must have the same number of loops"
    if call.dropout and x.numel() > _MAX_ELEMENTS:
        return f"with dropout x may have {_MAX_ELEMENTS} elements, got {x.numel()}"
    return None


def run(call: LoopedCall) -> tuple[Tensor, Tensor]:
    if call.trains:
        out, used = differentiable(call, _with_records, _backward)
        return out, used
    return _forward(call, call.x, packed_blocks(call), _loops(call), call.exit_threshold)


def _loops(call: LoopedCall) -> Tensor:
    if isinstance(call.num_loops, Tensor):
        return call.num_loops.contiguous()
    return torch.full((call.x.shape[0],), call.num_loops)


def _is_bf16(call: LoopedCall) -> bool:
    return call.dtype == torch.bfloat16


def _options(
    call: LoopedCall,
) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, bool, float, int]:
    """What both kernels take in the same place."""
    cos, sin = (None, None) if call.rotary is None else map(vector, call.rotary)
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    return call.num_heads, cos, sin, mask, _is_bf16(call), call.dropout, int(call.dropout_seed)


def packed_blocks(call: LoopedCall) -> list[Tensor]:
    """The tensors of all blocks as the kernels read them."""
    bf16 = _is_bf16(call)
    return [
        tensor
        for b in call.plain_blocks
        for tensor in (
            vector(b.norm1),
            packed_linear(b.qkv, bf16=bf16, heads=call.num_heads, parts=3),
            packed_linear(b.attn_out, bf16=bf16),
            vector(b.norm2),
            packed_linear(b.mlp_in, bf16=bf16),
            vector(b.mlp_in_bias),
            packed_linear(b.mlp_out, bf16=bf16),
            vector(b.mlp_out_bias),
        )
    ]


def _forward(
    call: LoopedCall,
    x: Tensor,
    packed: list[Tensor],
    loops: Tensor,
    threshold: float | None,
    first_loop: int = 0,
    loop_inputs: Tensor | None = None,
    records: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from loopmdm_kernels import _C

    x = x.detach().contiguous()
    out, used = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.int64)
    _C.looped_blocks(
        *(x, packed, vector(call.modulation), loops, *_options(call)),
        *(
            first_loop,
            -1.0 if threshold is None else threshold,
            torch.get_num_threads(),
            out,
            used,
            loop_inputs,
            records,
        ),
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
    def memory(cls, block: BlockWeights, modulation_rows: int, *, zeros: bool) -> _Gradients:
        """Zeros; those of the weights as they come, unless `zeros`."""
        from loopmdm_kernels import _C

        def like(weight: Tensor) -> Tensor:
            shape = (weight.shape[0], _C.padded_columns(weight.shape[1]))
            return (torch.zeros if zeros else torch.empty)(shape, dtype=torch.float32)

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


def _with_records(call: LoopedCall, _: Sequence[bool]) -> tuple[tuple[Tensor, Tensor], Kept]:
    loops = _loops(call)
    most, loop_inputs, memory = int(loops.max()), None, None
    if call.recompute:
        loop_inputs = torch.empty(most, *call.x.shape, dtype=torch.float32)
    else:
        memory = _RecordMemory(_record_shape(call, most * len(call.blocks)))
    records = None if memory is None else memory.records
    out, used = _forward(
        *(call, call.x, packed_blocks(call), loops, call.exit_threshold),
        loop_inputs=loop_inputs,
        records=records,
    )
    return (out, used), Kept((used,), (loop_inputs, memory))


def _backward(call: LoopedCall, kept: Kept, _: Sequence[bool], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    (used,), (loop_inputs, memory) = kept
    blocks = call.plain_blocks
    most = int(used.max())  # fewer than were allowed where every sequence stopped early
    gradients = [_Gradients.memory(block, call.modulation.shape[1], zeros=most == 0) for block in blocks]
    packed, bf16 = packed_blocks(call), _is_bf16(call)
    grad = grads[0].float().clone(memory_format=torch.contiguous_format)
    transposed = [
        packed_linear(weight, bf16=bf16, transposed=True)
        for block in blocks
        for weight in (block.qkv, block.attn_out, block.mlp_in, block.mlp_out)
    ]
    sums = [tensor for gradient in gradients for tensor in gradient]

    def back(first_loop: int, loops: Tensor, records: Tensor, add: bool) -> None:
        from loopmdm_kernels import _C

        _C.looped_blocks_backward(
            *(grad, packed, transposed, vector(call.modulation), loops, *_options(call)),
            *(first_loop, torch.get_num_threads(), records, sums, add),
        )

    if memory is not None:
        back(0, used, memory.records[: most * len(blocks)], most == 0)
    else:
        memory = _RecordMemory(_record_shape(call, len(blocks)))
        for loop in reversed(range(most)):
            once = (used > loop).long()
            _forward(call, loop_inputs[loop], packed, once, None, loop, records=memory.records)
            back(loop, once, memory.records, loop + 1 < most)
    grad_weights: list[Tensor] = []
    grad_modulation = torch.empty_like(call.modulation)
    for index, (block, gradient) in enumerate(zip(blocks, gradients, strict=True)):
        of_block, grad_modulation[index] = gradient.finish(block, call.modulation[index].detach())
        grad_weights += of_block
    return grad, *grad_weights, grad_modulation


def _record_shape(call: LoopedCall, applications: int) -> tuple[int, ...]:
    from loopmdm_kernels import _C

    batch, length, hidden = call.x.shape
    width = call.blocks[0].mlp_in.shape[0]
    return applications, batch, _C.record_bytes(length, hidden, width, call.num_heads, _is_bf16(call))


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
    release_stale_memory()
    gradient_memory.release()
    with _RecordMemory._lock:
        _RecordMemory._spare.clear()
