"""The launches of every Triton kernel at the shapes of the presets, written down without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from loopmdm_kernels.calls import AttentionCall, CrossEntropyCall, Draw, HeadCall, LoopedCall, SampleCall
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.triton import attention, head_logits, looped_blocks, masked_cross_entropy, sample_rows
from loopmdm_kernels.triton.launch import Launch, Processor, recording
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Fp8Head, Fp8Weight, Head, Rotary, RowRng

PROCESSORS = {80: Processor(80, 108), 90: Processor(90, 132), 100: Processor(100, 148)}
# Hidden size, heads, vocabulary, batch, length of the presets; few and many tokens: small, large tiles.
SHAPES = {
    "tiny": (512, 8, 50258, 16, 1024),
    "small": (768, 12, 50258, 16, 1024),
    "small-short": (768, 12, 50258, 1, 128),
    "medium": (1024, 16, 50258, 16, 1024),
    "sudoku": (128, 4, 10, 64, 81),
}


def preset_launches(shape: str, dtype: torch.dtype, processor: Processor) -> list[Launch]:
    """Forward and backward of all ops, with the options that change a kernel."""
    hidden_size, heads, vocab_size, batch, length = SHAPES[shape]
    tokens = batch * length

    def meta(tensor: Tensor, dtype: torch.dtype, *leading: int) -> Tensor:
        size = (*leading, *tensor.shape[len(leading) :])
        return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    small = looped_inputs(1, 2, hidden_size, heads, 2)
    blocks = [BlockWeights(*(meta(w, dtype) for w in block)) for block in small.blocks]
    x = meta(small.x, torch.float32, batch, length)
    # Each sequence its own modulation where their length is no multiple of a tile.
    own = batch if length % 64 else 1
    modulation = meta(small.modulation, dtype, len(blocks), own)
    angle = torch.empty(length, hidden_size // heads // 2, device="meta")
    mask = torch.empty(batch, length, dtype=torch.bool, device="meta")
    _, cpu_head = head_inputs(1, 2, hidden_size, 2)
    head = Head(
        meta(cpu_head.norm, dtype),
        meta(cpu_head.weight, dtype, vocab_size),
        meta(cpu_head.bias, dtype, vocab_size),
        meta(cpu_head.modulation, dtype, own),
        vocab_size - 1,
    )
    rows = torch.empty(max(1, tokens // 2), dtype=torch.int64, device="meta")
    names = RowRng(2**40, *(name.to("meta") for name in row_rng(rows.shape[0])[1:]))
    weights = torch.empty(rows.shape[0], device="meta")
    targets = torch.empty(batch, length, dtype=torch.int64, device="meta")
    shared = {"num_heads": heads, "rotary": Rotary(angle, angle)}
    with recording(processor) as launches:
        call = LoopedCall(x, blocks, modulation, 1, **shared)
        looped_blocks.run(replace(call, recompute=True))[0].sum().backward()
        looped_blocks.run(replace(call, dropout=0.1))[0].sum().backward()
        with torch.no_grad():
            looped_blocks.run(replace(call, key_mask=mask, exit_threshold=0.1))
            sample_rows.run(SampleCall(x, head, None, rows, Draw(names)))
            head_logits.run(HeadCall(x, head, None))
        loss = CrossEntropyCall(x, head, None, targets, rows, weights)
        masked_cross_entropy.run(loss)[0].backward()
        if dtype == torch.bfloat16 and hidden_size == SHAPES["small"][0]:
            fp8_calls(call, loss, names)
        q = torch.empty(batch, heads, length, hidden_size // heads, dtype=dtype, device="meta")
        attention.run(AttentionCall(q.requires_grad_(), q, q, mask)).sum().backward()
    return launches


def fp8_calls(call: LoopedCall, loss: CrossEntropyCall, names: RowRng) -> None:
    """The ops that take e4m3 matrices, with those of these shapes."""

    def fp8(weight: Tensor) -> Fp8Weight:
        scale = torch.empty(weight.shape[0], device="meta")
        return Fp8Weight(weight.detach().to(torch.float8_e4m3fn), scale)

    x, head = call.x.detach(), loss.head
    blocks = [Fp8BlockWeights(*(fp8(w) if w.ndim == 2 else w.detach() for w in call.plain_blocks[0]))]
    narrow = Fp8Head(*(t.detach() for t in head[:4]), head.excluded_token)._replace(weight=fp8(head.weight))
    modulation = head.modulation.new_empty(1, head.modulation.shape[0], 6, x.shape[2])
    dtype = torch.bfloat16
    looped_blocks.run(replace(call, x=x, blocks=blocks, modulation=modulation, compute_dtype=dtype))
    sample_rows.run(SampleCall(x, narrow, dtype, loss.rows, Draw(names)))
    head_logits.run(HeadCall(x, narrow, dtype))
    masked_cross_entropy.run(replace(loss, hidden=x, head=narrow, compute_dtype=dtype))


def all_launches(archs: tuple[int, ...], shapes: tuple[str, ...]) -> Iterator[tuple[str, Launch]]:
    """(shape and dtype, launch): all shapes on sm_90, and all dtypes at one of them; one shape elsewhere."""
    for arch in archs:
        for shape in shapes:
            if arch != 90 and shape != "small":
                continue
            dtypes = [torch.bfloat16] + [torch.float16, torch.float32] * (shape == "small-short")
            for dtype in dtypes:
                for launch in preset_launches(shape, dtype, PROCESSORS[arch]):
                    yield f"{shape} {str(dtype).removeprefix('torch.')}", launch
