"""What one denoising step runs, and runs of equal steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from loopmdm.exits import ExitRule, HiddenChange
from loopmdm.model.loop_law import loop_count
from loopmdm_kernels.values import whole


class StepCompute(NamedTuple):
    """What one denoising step runs.

    model: the denoiser, or None for the one given to `sample`. num_loops: loops of the looped block (the
    most, where there is an exit rule), or None for the model's max_loops. exit: ends the loop of a sequence,
    after loop min_loops at the earliest; None = never.
    """

    model: Any = None
    num_loops: int | None = None
    exit: ExitRule | None = None
    min_loops: int = 1

    def __str__(self) -> str:
        parts = []
        if self.model is not None:
            parts.append(f"{type(self.model).__name__}({self.model.config.num_layers} layers)")
        if self.exit is not None:
            parts.append(self._adaptive())
        elif self.num_loops is not None:
            parts.append(str(self.num_loops) if self.model is None else f"S{self.num_loops}")
        return " ".join(parts) or "S_max"

    def _adaptive(self) -> str:
        plain = isinstance(self.exit, HiddenChange) and self.exit.threshold is not None
        rule = f"eps={self.exit.eps:g}" if plain and isinstance(self.exit, HiddenChange) else str(self.exit)
        most = "" if self.num_loops is None else f", max_loops={self.num_loops}"
        least = "" if self.min_loops == 1 else f", min_loops={self.min_loops}"
        return f"adaptive({rule}{most}{least})"


class Segment(NamedTuple):
    """A run of equal steps. steps = None stands for all steps, however many there are."""

    name: str
    steps: int | None
    compute: StepCompute


def make_compute(
    model: Any = None, num_loops: Any = None, rule: ExitRule | None = None, min_loops: Any = 1
) -> StepCompute:
    """A `StepCompute` whose numbers are checked."""
    if model is not None and not hasattr(model, "config"):
        raise TypeError(f"a model of a plan has a config, got {type(model).__name__}")
    if rule is not None and not isinstance(rule, ExitRule):
        raise TypeError(f"exit must be an ExitRule or None, got {type(rule).__name__}")
    most = None if num_loops is None else loop_count("max_loops" if rule else "num_loops", num_loops)
    least = loop_count("min_loops", min_loops)
    if rule is None and least != 1:
        raise ValueError(f"min_loops is {least}, but without an exit rule no sequence stops early")
    if most is not None and least > most:
        raise ValueError(f"min_loops is {least}, beyond max_loops {most}")
    return StepCompute(model, most, rule, least)


def compute_of(name: str, choice: Any) -> StepCompute:
    """The compute meant by a loop count, a model or a `StepCompute`."""
    if isinstance(choice, StepCompute):
        return make_compute(*choice)
    if whole(choice) is not None or isinstance(choice, bool):
        return StepCompute(num_loops=loop_count(name, choice))
    if not hasattr(choice, "config"):
        raise TypeError(f"{name} must be a loop count or a model with a config, got {type(choice).__name__}")
    return StepCompute(model=choice)
