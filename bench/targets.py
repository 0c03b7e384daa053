"""What the kernels are to reach: at least this, against the best peer and the peak of the processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bench.roofline import multiplies_bf16


class Target(NamedTuple):
    speedup: float  # over the best peer
    share_of_peak: float | None = None  # of the instruction peak of the dtype
    memory: float | None = None  # at most: peak memory over that of the weight and its gradient
    reach: float | None = None  # the speed-up hoped for beyond the demand
    reach_share: float | None = None


# Where the instruction set has a product of bf16, and where fp32 is what is fast.
BF16_TARGETS = {
    "test_looped_blocks[D768-T1024-bf16]": Target(2.0, 0.82, reach=2.3, reach_share=0.90),
    "test_looped_blocks[D768-T128-bf16]": Target(1.8, 0.85),
    "test_looped_blocks[D256-T81-bf16]": Target(2.5, 0.65),
    "test_looped_blocks[D256-B64xL81-bf16]": Target(2.1, 0.80),
    "test_looped_blocks[D768-T1024-fp32]": Target(2.2, 0.80),
    "test_model": Target(1.8, 0.80),
    "test_training_step": Target(1.8, 0.70),
    "test_drop_in": Target(1.4),
    "test_attention[12x1024x64-forward]": Target(3.0),
    "test_masked_cross_entropy[bf16-parameters]": Target(1.8, memory=1.3, reach=2.0),
    "test_masked_cross_entropy[fp32-parameters]": Target(1.8, memory=1.3, reach=2.0),
    "test_sample_rows[R1]": Target(4.0, reach=5.0),
    "test_sample_rows[R16]": Target(4.0, reach=5.0),
    "test_sample_rows[R256]": Target(3.0),
    "test_sample_tokens[R1]": Target(4.0, reach=5.0),
    "test_sample_tokens[R16]": Target(4.0, reach=5.0),
    "test_sample_tokens[R256]": Target(3.0),
    "test_sampling[S1]": Target(4.0),
    "test_sampling[S12]": Target(2.5),
}
FP32_TARGETS = {
    "test_looped_blocks[D768-T1024-fp32]": Target(1.35, 0.85),
    "test_looped_blocks[D768-T128-fp32]": Target(1.8, 0.88),
    "test_looped_blocks[D256-T81-fp32]": Target(2.2, 0.70),
    "test_looped_blocks[D256-B64xL81-fp32]": Target(1.6, 0.82),
    "test_model": Target(1.35, 0.80),
    "test_training_step": Target(1.6, 0.75),
    "test_drop_in": Target(1.4),
    "test_masked_cross_entropy[bf16-parameters]": Target(1.5, memory=1.3),
    "test_masked_cross_entropy[fp32-parameters]": Target(1.5, memory=1.3),
    "test_sample_rows[R1]": Target(3.0),
    "test_sample_rows[R16]": Target(3.0),
    "test_sample_rows[R256]": Target(3.0),
    "test_sample_tokens[R1]": Target(3.0),
    "test_sample_tokens[R16]": Target(3.0),
    "test_sample_tokens[R256]": Target(3.0),
}


def targets_of(isa: str) -> Mapping[str, Target]:
    """Of an instruction set, as `cpu_isa` names it."""
    return BF16_TARGETS if multiplies_bf16(isa) else FP32_TARGETS


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
