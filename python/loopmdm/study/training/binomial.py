"""Shares of successes and their intervals."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a probability: inside [0, 1] and of some width also at 0 and at `trials`."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes is {successes}, trials is {trials}; accepted: 0 to trials, and 1 trial")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (center - spread) / scale  # exactly, which rounding would miss
    high = 1.0 if successes == trials else (center + spread) / scale
    return low, high
