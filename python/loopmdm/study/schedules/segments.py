"""Schedules of light and heavy steps over equal segments of the denoising, and what the segments do.

Segment 0 is the fully masked end. A schedule is a tuple with True where a segment is light. Scores are
losses: a score that is better when larger is given with its sign changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, groupby

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopmdm_kernels.values import integer, positive

Schedule = tuple[bool, ...]
Floats = NDArray[np.float64]

# Where the light steps of the hand-made schedules lie, in eighths of the denoising.
_HAND = {
    "all light": range(8),
    "light in quarter 1": (0, 1),
    "light in quarter 2": (2, 3),
    "light in quarter 3": (4, 5),
    "light in quarter 4": (6, 7),
    "sandwich": (0, 7),
    "all heavy": (),
}


def hand_schedules() -> dict[str, Schedule]:
    """The hand-made schedules of the model-scheduling paper (Figs 1, 7-9) over 8 segments, by name."""
    return {name: tuple(j in light for j in range(8)) for name, light in _HAND.items()}


def enumerate_schedules(segments: int, light: int) -> list[Schedule]:
    """All schedules with `light` light segments: (10, 4) has 210."""
    number, chosen_of = positive("segments", segments), integer("light", light)
    if not 0 <= chosen_of <= number:
        raise ValueError(f"light must be an integer in 0..{number}, got {light!r}")
    return [tuple(j in chosen for j in range(number)) for chosen in combinations(range(number), chosen_of)]


def borders(segments: int, steps: int) -> list[int]:
    """First step of each segment and the number of steps: as equal as whole numbers allow."""
    if not 1 <= segments <= steps:
        raise ValueError(f"steps is {steps}: {segments} segments need at least one step each")
    return [steps * j // segments for j in range(segments + 1)]


def schedule_text(schedule: Schedule, steps: int) -> str:
    """The schedule over `steps` steps as `ComputePlan.parse` reads it, such as "L125,H750,L125"."""
    edges = borders(len(schedule), steps)
    sizes = np.diff(edges).tolist()
    letters = "".join(("L" if light else "H") * size for light, size in zip(schedule, sizes, strict=True))
    return ",".join(f"{letter}{len(list(run))}" for letter, run in groupby(letters))


def segment_influence(schedules: Sequence[Schedule], scores: ArrayLike) -> Floats:
    """I_j: mean score of the schedules with segment j light less the mean of all; > 0 is harmful.

    scores: [..., N], one for each schedule. Returns [..., segments]. (Model scheduling, Fig. 6.)
    """
    light, values = _table(schedules, scores)
    count = light.sum(0)
    if not count.all():
        raise ValueError(f"schedules: no schedule has segment {int((count == 0).argmax())} light")
    influence: Floats = values @ light / count - values.mean(-1, keepdims=True)
    return influence


def segment_frequency(schedules: Sequence[Schedule], scores: ArrayLike, top: int) -> tuple[Floats, Floats]:
    """Share of the `top` best and of the `top` worst schedules in which each segment is light.

    scores: [..., N]; ties go to the schedule that comes first. Returns two [..., segments]. (Figs 3, 10.)
    """
    light, values = _table(schedules, scores)
    if not 1 <= top <= len(light):
        raise ValueError(f"top must be in 1..{len(light)}, got {top}")
    order = values.argsort(-1, kind="stable")
    worst = (-values).argsort(-1, kind="stable")
    return light[order[..., :top]].mean(-2), light[worst[..., :top]].mean(-2)


def _table(schedules: Sequence[Schedule], scores: ArrayLike) -> tuple[Floats, Floats]:
    light = np.asarray(schedules, dtype=float)
    values = np.asarray(scores, dtype=float)
    if light.ndim != 2 or values.shape[-1:] != (len(light),):
        raise ValueError(
            f"scores: got shape {list(values.shape)} for {len(schedules)} schedules, expected one score each"
        )
    return light, values
