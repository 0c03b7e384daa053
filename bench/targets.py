"""What the kernels are to reach: at least this, against the best peer and the peak of the processor."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    speedup: float  # over the best peer
    share_of_peak: float | None = None  # of the instruction peak of the dtype
    memory: float | None = None  # at most: peak memory over that of the weight and its gradient
    reach: float | None = None  # the speed-up hoped for beyond the demand
    reach_share: float | None = None


TARGETS = {
    "test_looped_blocks[D768-T1024-bf16]": Target(2.0, 0.80, reach=2.3, reach_share=0.90),
    "test_looped_blocks[D768-T128-bf16]": Target(1.3, 0.75, reach=1.5, reach_share=0.85),
    "test_looped_blocks[D256-T81-bf16]": Target(2.0, 0.60, reach=2.5),
    "test_looped_blocks[D256-B64xL81-bf16]": Target(1.7, 0.75, reach=1.9),
    "test_looped_blocks[D768-T1024-fp32]": Target(2.2, 0.80),
    "test_model": Target(1.6, 0.80),
    "test_attention[12x1024x64-forward]": Target(3.0),
    "test_masked_cross_entropy[bf16-parameters]": Target(2.0, memory=1.3),
    "test_masked_cross_entropy[fp32-parameters]": Target(2.0, memory=1.3),
    "test_sample_rows[R1]": Target(5.0),
    "test_sample_rows[R16]": Target(5.0),
    "test_sample_rows[R256]": Target(3.0),
    "test_training_step": Target(1.7, 0.70),
    "test_sampling[S1]": Target(4.0),
    "test_sampling[S12]": Target(2.5),
}

# Of `make gpu`, by phase. Triton: the speed over that of the best peer.
TRITON_TARGETS = {
    "T128": 1.5,
    "T1024": 1.2,
    "T16384": 1.05,
    "training": 1.15,
    "masked_cross_entropy": 2.5,
    "sample_rows_R64": 5.0,
    "sample_rows_R1024": 5.0,
    "sampling": 3.0,
}
MEMORY_TARGET = 1.3  # at most: peak of 12 loops over that of one, with gradients

# Of the Hopper kernels, by number of tokens: speed over torch.compile, share of the modelled limit.
HOPPER_TARGETS = {32: 2.0, 128: 2.0, 512: 1.5, 1024: 1.25}
LIMIT_SHARES = {128: 0.6, 1024: 0.7}
DRAM_RATIO = 1.1  # at most: bytes read with S = 24 over those with S = 1
SUDOKU_SECONDS = 150e-6  # at most
