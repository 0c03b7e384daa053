"""What the tests and benchmarks share, shipped so that users can check a backend on their own machine."""

from loopmdm_kernels.testing.cross_entropy import (
    LEAVES,
    CrossEntropyInputs,
    assert_cross_entropy,
    cross_entropy_inputs,
    cross_entropy_results,
)
from loopmdm_kernels.testing.generators import (
    LoopedInputs,
    head_inputs,
    looped_inputs,
    row_rng,
)
from loopmdm_kernels.testing.graphs import RecordedGraphs
from loopmdm_kernels.testing.head_gradients import assert_head_gradients, head_gradients
from loopmdm_kernels.testing.law import chi_square_p
from loopmdm_kernels.testing.loops import error_over_loops
from loopmdm_kernels.testing.timers import interleaved_medians, interleaved_times
from loopmdm_kernels.testing.tolerance import assert_matches_oracle, rounding_step

__all__ = [
    "LEAVES",
    "CrossEntropyInputs",
    "LoopedInputs",
    "RecordedGraphs",
    "assert_cross_entropy",
    "assert_head_gradients",
    "assert_matches_oracle",
    "chi_square_p",
    "cross_entropy_inputs",
    "cross_entropy_results",
    "error_over_loops",
    "head_gradients",
    "head_inputs",
    "interleaved_medians",
    "interleaved_times",
    "looped_inputs",
    "rounding_step",
    "row_rng",
]
