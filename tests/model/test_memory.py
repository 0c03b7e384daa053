"""L14: with recomputation, what a backward pass keeps hardly depends on S."""

from __future__ import annotations

import gc
from itertools import accumulate

import torch

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm_kernels.cpu.looped_blocks import release_spare_memory

BATCH, LENGTH, HIDDEN = 4, 128, 64


def peak_bytes(num_loops: int, recompute: bool) -> int:
    """Most that the allocator has given out during a forward and a backward pass."""
    gc.collect()
    release_spare_memory()  # of earlier steps, which would not be given out anew
    torch.manual_seed(0)
    model = LoopMDM(
        LoopMDMConfig(
            vocab_size=32,
            mask_token_id=31,
            hidden_size=HIDDEN,
            num_heads=2,
            num_layers=6,
            max_length=LENGTH,
            loop_start=1,
            loop_end=3,
            max_loops=12,
        )
    )
    model.recompute = recompute
    tokens = torch.randint(31, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        model.loss(tokens, num_loops=num_loops, seed=0).loss.backward()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes)))


def test_what_loops_keep() -> None:
    """With recomputation what each loop begins with; without it everything of two blocks, eleven times."""
    stream = BATCH * LENGTH * HIDDEN * 4
    peak_bytes(1, True)  # makes what is made once
    once, recomputed, kept = peak_bytes(1, True), peak_bytes(12, True), peak_bytes(12, False)
    assert 0 < recomputed - once <= 12 * stream
    assert kept - once > 100 * stream
