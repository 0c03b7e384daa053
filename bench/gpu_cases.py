"""What `make gpu` checks and times: inputs, our ops and their peers, at real sizes or at tiny ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench import peers
from loopmdm_kernels import reference
from loopmdm_kernels.testing import LoopedInputs, head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Fp8Head, Head, Rotary, RowRng

Calls = Mapping[str, Callable[[], Any]]


class Sizes(NamedTuple):
    """Of the model and of the cases."""

    hidden: int
    heads: int
    vocab_size: int
    forward: tuple[tuple[int, int], ...]  # batch and length of looped_blocks forward
    training: tuple[int, int]  # batch and length of looped_blocks and masked_cross_entropy with gradients
    checked: tuple[int, int]  # batch and length where values are compared with float64
    loops: int
    training_loops: int
    sampled_rows: tuple[int, ...]
    sampling: tuple[int, int, int]  # batch, length and steps of a whole sampling run
    step: tuple[int, int, int]  # the same of a run whose steps are short
    repeats: int


REAL = Sizes(
    hidden=768,
    heads=12,
    vocab_size=50258,
    forward=((1, 128), (1, 1024), (16, 1024)),
    training=(16, 1024),
    checked=(2, 1024),
    loops=12,
    training_loops=6,
    sampled_rows=(64, 1024),
    sampling=(8, 1024, 256),
    step=(1, 128, 64),
    repeats=15,
)
TINY = Sizes(
    hidden=16,
    heads=2,
    vocab_size=40,
    forward=((1, 4),),
    training=(1, 4),
    checked=(1, 6),
    loops=1,
    training_loops=1,
    sampled_rows=(3,),
    sampling=(1, 3, 2),
    step=(1, 2, 2),
    repeats=1,
)


def looped_on(
    device: torch.device, sizes: Sizes, batch: int, length: int, dtype: torch.dtype, *, grad: bool = False
) -> LoopedInputs:
    inputs = looped_inputs(batch, length, sizes.hidden, sizes.heads, 2)
    rotary = inputs.rotary
    moved = inputs._replace(
        x=inputs.x.to(device),
        blocks=[BlockWeights(*(w.to(device) for w in block)) for block in inputs.blocks],
        modulation=inputs.modulation.to(device),
        rotary=None if rotary is None else Rotary(*(a.to(device) for a in rotary)),
    )
    return moved.to(dtype, requires_grad=grad)


def head_on(
    device: torch.device, sizes: Sizes, batch: int, length: int, dtype: torch.dtype, *, grad: bool = False
) -> tuple[Tensor, Head]:
    hidden, head = head_inputs(
        batch, length, sizes.hidden, sizes.vocab_size, excluded_token=sizes.vocab_size - 1
    )
    leaves = [t.to(device, dtype).requires_grad_(grad) for t in head[:4]]
    wide = torch.promote_types(dtype, torch.float32)
    return hidden.to(device, wide).requires_grad_(grad), Head(*leaves, head.excluded_token)


def in_fp8(inputs: LoopedInputs, head: Head) -> tuple[list[Fp8BlockWeights], Fp8Head]:
    """The matrices rounded from bf16 to e4m3."""
    blocks = [BlockWeights(*(w.to(torch.bfloat16) for w in block)) for block in inputs.blocks]
    norm, weight, bias, modulation = (t.to(torch.bfloat16) for t in head[:4])
    narrow = Head(norm, weight, bias, modulation, head.excluded_token)
    return [Fp8BlockWeights.of(block) for block in blocks], Fp8Head.of(narrow)


def rows_on(device: torch.device, sizes: Sizes, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(targets [B, L], every second row, weights of the rows)."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(sizes.vocab_size - 1, (batch, length), generator=generator)
    rows = torch.arange(0, batch * length, 2)
    weights = torch.rand(rows.shape[0], generator=generator) + 0.5
    return targets.to(device), rows.to(device), weights.to(device)


def names_on(device: torch.device, num_rows: int) -> RowRng:
    rng = row_rng(num_rows)
    return RowRng(rng.seed, *(name.to(device) for name in rng[1:]))


def apply_loops(op: Callable[..., Any], inputs: LoopedInputs, num_loops: int, **options: Any) -> Tensor:
    out: Tensor = op(
        inputs.x,
        inputs.blocks,
        inputs.modulation,
        num_loops,
        num_heads=inputs.num_heads,
        rotary=inputs.rotary,
        **options,
    )
    return out


def loop_by_loop(inputs: LoopedInputs, num_loops: int, one_loop: Callable[..., Tensor]) -> Tensor:
    """One compiled graph of the blocks, applied again and again."""
    state = inputs.x
    for _ in range(num_loops):
        state = one_loop(inputs._replace(x=state))
    return state


def reference_loop(inputs: LoopedInputs) -> Tensor:
    return apply_loops(reference.looped_blocks, inputs, 1)


def forward_calls(inputs: LoopedInputs, num_loops: int, compiled: Callable[..., Any]) -> Calls:
    one_loop = compiled(reference_loop)
    return {
        "ours": lambda: apply_loops(lk.looped_blocks, inputs, num_loops),
        "eager": lambda: apply_loops(reference.looped_blocks, inputs, num_loops),
        "compiled": lambda: loop_by_loop(inputs, num_loops, one_loop),
    }


def gradients_of(result: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(result().sum(), leaves)


def training_calls(inputs: LoopedInputs, num_loops: int, compiled: Callable[..., Any]) -> Calls:
    leaves, one_loop = list(inputs.leaves().values()), compiled(reference_loop)
    results: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: apply_loops(lk.looped_blocks, inputs, num_loops),
        "ours, recomputed": lambda: apply_loops(lk.looped_blocks, inputs, num_loops, recompute=True),
        "compiled": lambda: loop_by_loop(inputs, num_loops, one_loop),
    }
    return {name: gradients_of(result, leaves) for name, result in results.items()}


def cross_entropy_calls(
    hidden: Tensor, head: Head, chosen: tuple[Tensor, Tensor, Tensor], compiled: Callable[..., Any]
) -> Calls:
    targets, rows, weights = chosen
    leaves = [hidden, *head[:4]]
    every_row = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
    every_weight = torch.ones(every_row.shape[0], device=hidden.device)
    plain = compiled(peers.masked_cross_entropy)

    def loss(function: Callable[..., Any], *which: Tensor) -> Callable[[], Any]:
        return gradients_of(lambda: function(hidden, head, targets, *which)[0], leaves)

    calls = {
        "ours": loss(lk.masked_cross_entropy, rows, weights),
        "compiled": loss(plain, rows, weights),
        "compiled, all rows": loss(plain, every_row, every_weight),
    }
    liger = liger_loss(hidden, head, targets)
    return (
        calls if liger is None else {**calls, "Liger, all rows": gradients_of(liger, [hidden, head.weight])}
    )


def liger_loss(hidden: Tensor, head: Head, targets: Tensor) -> Callable[[], Tensor] | None:
    """Liger's fused linear cross-entropy on all rows, without the norm; None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    narrow = hidden.flatten(0, 1).to(head.weight.dtype)
    return lambda: loss(head.weight, narrow, targets.flatten(), head.bias)


def fp8_calls(
    inputs: LoopedInputs, num_loops: int, hidden: Tensor, head: Head, num_rows: int
) -> dict[str, Calls]:
    """Loops and draws with weights in e4m3, beside the same in bf16."""
    blocks, narrow = in_fp8(inputs, head)
    narrow_inputs = inputs._replace(blocks=blocks)  # type: ignore[arg-type]
    rows, names = torch.arange(num_rows, device=hidden.device), names_on(hidden.device, num_rows)
    options = {"compute_dtype": torch.bfloat16}
    return {
        "looped_blocks": {
            "ours": lambda: apply_loops(lk.looped_blocks, narrow_inputs, num_loops, **options),
            "bf16 weights": lambda: apply_loops(lk.looped_blocks, inputs, num_loops),
        },
        "sample_rows": {
            "ours": lambda: lk.sample_rows(hidden, narrow, rows, names, **options),
            "bf16 weights": lambda: lk.sample_rows(hidden, head, rows, names),
        },
    }


def sample_calls(hidden: Tensor, head: Head, num_rows: int, compiled: Callable[..., Any]) -> Calls:
    rows = torch.arange(num_rows, device=hidden.device)
    names = names_on(hidden.device, num_rows)

    def gumbel(hidden: Tensor, head: Head, rows: Tensor) -> Tensor:
        """fp32 noise on logits in memory, as serving libraries sample."""
        logits = peers.row_logits(hidden, head, rows, peers.possible(head), head.weight.dtype).float()
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)

    plain, fast = compiled(peers.sample_rows), compiled(gumbel)
    return {
        "ours": lambda: lk.sample_rows(hidden, head, rows, names),
        "compiled, float64 race": lambda: plain(hidden, head, rows),
        "compiled, fp32 noise": lambda: fast(hidden, head, rows),
    }


def attention_calls(device: torch.device, sizes: Sizes, batch: int, length: int, dtype: torch.dtype) -> Calls:
    """Ours and every backend of scaled_dot_product_attention that takes these tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (batch, sizes.heads, length, sizes.hidden // sizes.heads)
    q, k, v = torch.randn(3, *shape, device=device, dtype=dtype).unbind()
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: lk.attention(q, k, v)}

    def attend(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return run

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        call = attend(backend)
        try:
            call()
        except RuntimeError:  # it does not take these tensors on this device
            continue
        calls[backend.name.lower()] = call
    return calls
