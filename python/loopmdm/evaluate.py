"""Held-out likelihood under the name it is documented by; it is in `loopmdm.quality.likelihood`."""

from loopmdm.quality.likelihood import (
    NLLResult,
    evaluate_autoregressive,
    evaluate_nll,
    nll_by_sequence,
    nll_by_time_bin,
)

__all__ = ["NLLResult", "evaluate_autoregressive", "evaluate_nll", "nll_by_sequence", "nll_by_time_bin"]
