"""What a loop costs on the clock: t(S) = a + b S, and b beside the time of the looped layers alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loopmdm.model import LoopMDM
from loopmdm.study.kit.folder import Row, StudyFolder

LEAST_R2, MOST_DEVIATION = 0.99, 0.25  # L5


class Line(NamedTuple):
    """t(S) = a + b S by least squares."""

    a: float
    b: float
    r_squared: float

    @classmethod
    def fit(cls, loops: Sequence[int], seconds: Sequence[float]) -> Line:
        x, y = np.asarray(loops, dtype=float), np.asarray(seconds)
        b, a = np.polyfit(x, y, 1)
        rest, whole = np.square(y - a - b * x).sum(), np.square(y - y.mean()).sum()
        return cls(float(a), float(b), float(1 - rest / whole) if whole else 1.0)


def rows_of_time(
    folder: StudyFolder, model: LoopMDM, tokens: Tensor, loops: Sequence[int], rounds: int
) -> list[Row]:
    """Times of forward passes of `tokens` [B, L]: of each loop count the fastest of `rounds`.

    Every round has all loop counts; other work on the machine only ever adds time.
    """
    stages = model.stages(tokens)
    state = stages.before()
    calls: list[Callable[[], object]] = [partial(model, tokens, num_loops=s) for s in loops]
    calls.append(partial(stages.loop, state, 1))

    def measure(key: str) -> list[float]:
        return [_seconds(call, tokens.device) for call in calls]

    for call in calls:
        _seconds(call, tokens.device)
    taken = folder.items([f"round {i}" for i in range(rounds)], measure, "rounds of timing")
    *passes, layers = (min(column) for column in zip(*taken, strict=True))
    line = Line.fit(loops, passes)
    folder.facts["timed_batch"] = list(tokens.shape)
    folder.find(
        "L5",
        "t(S) = a + b S with R^2 > 0.99, and b within 25 % of the time of the looped layers alone",
        f"a = {1e3 * line.a:.2f} ms, b = {1e3 * line.b:.2f} ms a loop, R^2 = {line.r_squared:.4f};"
        f" looped layers alone {1e3 * layers:.2f} ms (b is {line.b / layers:.2f} times that)",
        line.r_squared > LEAST_R2 and abs(line.b / layers - 1) < MOST_DEVIATION,
    )
    rows: list[Row] = [
        {"part": "time", "num_loops": s, "seconds": value, "fit_seconds": line.a + line.b * s}
        for s, value in zip(loops, passes, strict=True)
    ]
    rows.append({"part": "time of the looped layers", "seconds": layers})
    rows.append({"part": "fit of time", "a": line.a, "b": line.b, "r_squared": line.r_squared})
    return rows


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
