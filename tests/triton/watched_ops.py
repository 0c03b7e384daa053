"""Every op on small tensors whose sizes are no multiple of a tile: what the check of memory runs."""

import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Fp8BlockWeights, Fp8Head, Head

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
BATCH, LENGTH, HIDDEN, HEADS, VOCABULARY = 2, 19, 72, 3, 545
ROWS = torch.tensor([*range(1, 36), 7, BATCH * LENGTH - 1])  # one of them twice, and the last one


def with_gradients(out, leaves):
    """The output and what is left of it, seen backward with random gradients."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def blocks(dtype, length=LENGTH, hidden=HIDDEN, heads=HEADS, *, trains=False, own=True, **options):
    made = looped_inputs(BATCH, length, hidden, heads, 1, 1, per_sequence_modulation=own, key_mask=own)
    case = made.to(dtype, requires_grad=trains)
    return case, {"num_heads": heads, "rotary": case.rotary, "key_mask": case.key_mask, **options}


def trained_blocks(dtype, *, own=True, **options):
    case, options = blocks(dtype, trains=True, own=own, **options)
    out = lk.looped_blocks(case.x, case.blocks, case.modulation, 1, **options)
    return with_gradients(out, list(case.leaves().values()))


def trained_loops_of_each():
    """A sequence that ends before the other: what it did not take has no gradient."""
    case, options = blocks(FLOAT, trains=True)
    limits = torch.tensor([1, 2])
    out = lk.looped_blocks(case.x, case.blocks, case.modulation, limits, max_loops=2, **options)
    return with_gradients(out, [case.x, case.modulation])


def early_exit():
    case, options = blocks(FLOAT, LENGTH, 136, 2)  # three groups of statistics
    limits = torch.tensor([2, 1])
    out, used = lk.looped_blocks(
        case.x, case.blocks, case.modulation, limits, max_loops=2, exit_threshold=1e-9, **options
    )
    return [out, used]


def narrow_blocks():
    case, options = blocks(BF16, 32)  # a tile of rows lies in one sequence
    narrow = [Fp8BlockWeights.of(block) for block in case.blocks]
    return [lk.looped_blocks(case.x, narrow, case.modulation, 1, compute_dtype=BF16, **options)]


def trained_attention():
    """Strided: q, k and v beside each other, of heads of an odd size."""
    qkv = torch.randn(2, 70, 3, 1, 21, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) < 0.6
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return with_gradients(lk.attention(q, k, v, key_mask=mask), [qkv])


def head_of(dtype, *, own=True, trains=False):
    hidden, head = head_inputs(
        BATCH, LENGTH, HIDDEN, VOCABULARY, excluded_token=VOCABULARY - 1, per_sequence_modulation=own
    )
    made = Head(*(t.to(dtype).requires_grad_(trains) for t in head[:4]), VOCABULARY - 1)
    return hidden.float().requires_grad_(trains), made


def losses(dtype, *, own):
    hidden, head = head_of(dtype, own=own, trains=True)
    targets = torch.randint(VOCABULARY - 1, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(len(ROWS), generator=torch.Generator().manual_seed(3))
    _, nll = lk.masked_cross_entropy(hidden, head, targets, ROWS, weights)
    return with_gradients(nll, [hidden, *head[:4]])


def logits():
    hidden, head = head_of(BF16, trains=True)
    return with_gradients(lk.head_logits(hidden, head), [hidden, *head[:4]])


def many_tiles():
    """More rows of tiles than are taken together."""
    hidden, head = head_inputs(1, 9 * 32 + 5, 16, 70)
    return [lk.head_logits(hidden.float(), Head(*(t.float() for t in head[:4])))]


def draws(dtype, *, narrow=False, **options):
    hidden, head = head_of(dtype, own=narrow)
    return list(
        lk.sample_rows(
            hidden,
            Fp8Head.of(head) if narrow else head,
            ROWS,
            row_rng(len(ROWS), 11),
            compute_dtype=dtype,
            **options,
        )
    )


OPS = {
    "blocks": lambda: trained_blocks(BF16),
    "blocks, one modulation, dropout": lambda: trained_blocks(FLOAT, own=False, dropout=0.3),
    "loops of each": trained_loops_of_each,
    "early exit": early_exit,
    "fp8 blocks": narrow_blocks,
    "attention": trained_attention,
    "loss": lambda: losses(BF16, own=True),
    "loss, one modulation": lambda: losses(FLOAT, own=False),
    "logits": logits,
    "many tiles": many_tiles,
    "draws": lambda: draws(BF16),
    "most probable": lambda: draws(FLOAT, temperature=0.0),
    "fp8 draws": lambda: draws(BF16, narrow=True),
    "nucleus": lambda: draws(FLOAT, top_p=0.8),
}
