"""Compute plans: which weights, and how many loops, at every denoising step."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from loopmdm import flops

_LETTER_SEGMENT = re.compile(r"([LH])(\d+)")
_LOOPS_SEGMENT = re.compile(r"S(\d+):(\d+)")


class StepCompute(NamedTuple):
    """What one denoising step runs.

    model: the denoiser, or None for the one given to `sample`. num_loops: loops of the looped block (a cap
    when exit_threshold is set), or None for the model's max_loops. exit_threshold: stop a sequence once the
    relative change of its hidden state falls below it; None = never.
    """

    model: Any = None
    num_loops: int | None = None
    exit_threshold: float | None = None


@dataclass(frozen=True)
class Segment:
    """A run of equal steps. steps = None stands for all steps, however many there are."""

    name: str
    steps: int | None
    compute: StepCompute


@dataclass(frozen=True)
class ComputePlan:
    """Consecutive segments of denoising steps; index 0 is the fully masked end (t = 1).

    One abstraction for a loop schedule S(t) of one model and for a schedule of light and heavy models. Make
    one with `constant`, `parse`, `table` or `adaptive`.
    """

    segments: tuple[Segment, ...]

    @classmethod
    def constant(cls, num_loops: int) -> ComputePlan:
        """The same number of loops at every step."""
        loops = _positive("num_loops", num_loops)
        return cls((Segment(f"S{loops}", None, StepCompute(num_loops=loops)),))

    @classmethod
    def adaptive(cls, eps: float, max_loops: int) -> ComputePlan:
        """A sequence stops looping once ||H(k) - H(k-1)|| < eps ||H(k)||, at the latest after max_loops."""
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or math.isnan(eps) or eps < 0:
            raise ValueError(f"eps must be a number >= 0 (inf is accepted), got {eps!r}")
        compute = StepCompute(num_loops=_positive("max_loops", max_loops), exit_threshold=float(eps))
        return cls((Segment("adaptive", None, compute),))

    @classmethod
    def table(cls, loops: Iterable[int]) -> ComputePlan:
        """One loop count per step, the fully masked end first."""
        counts = [_positive(f"loops[{step}]", count) for step, count in enumerate(loops)]
        if not counts:
            raise ValueError("loops is empty, give at least one loop count")
        runs = [(count, len(list(run))) for count, run in groupby(counts)]
        return cls(tuple(Segment(f"S{count}", steps, StepCompute(num_loops=count)) for count, steps in runs))

    @classmethod
    def parse(cls, text: str, light: Any = None, heavy: Any = None) -> ComputePlan:
        """Read a schedule such as `"L125,H750,L125"` or `"(S2:125,S12:750,S2:125)"`.

        `L` and `H` stand for light and heavy, each a loop count or a model; `Sn:k` is n loops for k steps.
        The forms may be mixed, and parentheses around the whole are optional.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string such as 'L125,H750,L125', got {type(text).__name__}")
        body = text.strip()
        if body.startswith("(") and body.endswith(")"):
            body = body[1:-1]
        choices = {"L": ("light", light), "H": ("heavy", heavy)}
        segments = []
        for part in (part.strip() for part in body.split(",")):
            if match := _LETTER_SEGMENT.fullmatch(part):
                letter, steps = match[1], int(match[2])
                compute = _compute_of(*choices[letter])
            elif match := _LOOPS_SEGMENT.fullmatch(part):
                letter, steps = f"S{int(match[1])}", int(match[2])
                compute = StepCompute(num_loops=_positive(f"loops of {part!r}", int(match[1])))
            else:
                raise ValueError(
                    f"cannot read {part!r} in the plan {text!r}: accepted are L<steps>, H<steps>"
                    " and S<loops>:<steps>, separated by commas"
                )
            segments.append(Segment(letter, _positive(f"steps of {part!r}", steps), compute))
        return cls(tuple(segments))

    @property
    def num_steps(self) -> int | None:
        """Steps the plan covers, or None when it fits any number of steps."""
        steps = [segment.steps for segment in self.segments]
        return None if None in steps else sum(count for count in steps if count is not None)

    @property
    def models(self) -> dict[str, Any]:
        """Models the plan names, by segment name; models given by loop counts only are not listed."""
        return {s.name: s.compute.model for s in self.segments if s.compute.model is not None}

    def at(self, step: int, total_steps: int) -> StepCompute:
        """The compute of `step` in 0..total_steps - 1; step 0 is the fully masked end."""
        self.check_steps(total_steps)
        if not 0 <= step < total_steps:
            raise ValueError(f"step must be in 0..{total_steps - 1}, got {step}")
        if self.num_steps is None:
            return self.segments[0].compute
        ends = list(accumulate(segment.steps or 0 for segment in self.segments))
        return self.segments[bisect_right(ends, step)].compute

    def check_steps(self, total_steps: int) -> None:
        """Raise ValueError unless the plan covers exactly `total_steps` steps."""
        if self.num_steps not in (None, total_steps):
            raise ValueError(
                f"the plan {self} covers {self.num_steps} steps, but sampling takes {total_steps} steps"
            )

    def saved_flops(
        self, config: flops.Dimensions, length: int, convention: flops.Convention = "blocks"
    ) -> float:
        """Share of the forward FLOPs saved against running the costliest segment at every step.

        config: sizes of the model given to `sample`, for the segments that are loop counts. (L125,H750,L125)
            with 4
        of 12 blocks saves 1/6 in the papers' convention, blocks only. Every step is taken to run the network
        equally often. Adaptive plans depend on the data: see `SampleResult.ledger` for what a run executed.
        """
        if any(segment.compute.exit_threshold is not None for segment in self.segments):
            raise ValueError(f"the plan {self} is adaptive: what it saves is known only after a run")
        costs = []
        for segment in self.segments:
            dims = config if segment.compute.model is None else segment.compute.model.config
            loops = segment.compute.num_loops or dims.max_loops
            costs.append(flops.forward_flops(dims, length, loops, convention))
        steps = [segment.steps or 1 for segment in self.segments]
        spent = sum(count * cost for count, cost in zip(steps, costs, strict=True))
        return 1.0 - spent / (sum(steps) * max(costs))

    def __str__(self) -> str:
        first = self.segments[0]
        if first.compute.exit_threshold is not None:
            return f"adaptive(eps={first.compute.exit_threshold:g}, max_loops={first.compute.num_loops})"
        if first.steps is None:
            return first.name
        body = ",".join(f"{s.name}{':' if s.name.startswith('S') else ''}{s.steps}" for s in self.segments)
        meaning = {s.name: _describe(s.compute) for s in self.segments if not s.name.startswith("S")}
        return f"({body})" + "".join(f" {name}={what}" for name, what in sorted(meaning.items()))

    def __repr__(self) -> str:
        return f"<ComputePlan {self}>"

    def to_json(self) -> str:
        """The plan as JSON text. Models are stored by their segment name (L, H), never their weights."""
        rows = []
        for segment in self.segments:
            compute = segment.compute
            rows.append(
                {
                    "name": segment.name,
                    "steps": segment.steps,
                    "model": None if compute.model is None else segment.name,
                    "num_loops": compute.num_loops,
                    # JSON has no infinity; float() reads the word back
                    "exit_threshold": None
                    if compute.exit_threshold is None
                    else repr(compute.exit_threshold),
                }
            )
        return json.dumps({"segments": rows})

    @classmethod
    def from_json(cls, text: str, models: Mapping[str, Any] | None = None) -> ComputePlan:
        """The plan written by `to_json`. models: one model for every name the plan stores."""
        try:
            rows = json.loads(text)["segments"]
            segments = tuple(_segment_of(row, models or {}) for row in rows)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan written by ComputePlan.to_json: {error!r}") from error
        if not segments or (len(segments) > 1 and any(segment.steps is None for segment in segments)):
            raise ValueError("a plan needs one segment without a step count, or segments that all have one")
        return cls(segments)


def as_plan(plan: int | ComputePlan | None) -> ComputePlan:
    """The plan meant by an argument: None = the model's max_loops, an int = that many loops at every step."""
    if plan is None:
        return ComputePlan((Segment("S_max", None, StepCompute()),))
    if isinstance(plan, ComputePlan):
        return plan
    if isinstance(plan, int):
        return ComputePlan.constant(plan)
    raise TypeError(f"plan must be None, a loop count or a ComputePlan, got {type(plan).__name__}")


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _compute_of(name: str, choice: Any) -> StepCompute:
    if choice is None:
        raise ValueError(f"the plan uses {name}, but {name} is not given: pass {name}=<loop count or model>")
    if isinstance(choice, int):
        return StepCompute(num_loops=_positive(name, choice))
    if not hasattr(choice, "config"):
        raise TypeError(f"{name} must be a loop count or a model with a config, got {type(choice).__name__}")
    return StepCompute(model=choice)


def _describe(compute: StepCompute) -> str:
    if compute.model is None:
        return str(compute.num_loops)
    return f"{type(compute.model).__name__}({compute.model.config.num_layers} layers)"


def _segment_of(row: Mapping[str, Any], models: Mapping[str, Any]) -> Segment:
    name, steps, loops, threshold = row["name"], row["steps"], row["num_loops"], row["exit_threshold"]
    model = None
    if row["model"] is not None:
        if row["model"] not in models:
            raise ValueError(f"the plan needs the model {row['model']!r}, given are {sorted(models)}")
        model = models[row["model"]]
    compute = StepCompute(
        model,
        None if loops is None else _positive("num_loops", loops),
        None if threshold is None else float(threshold),
    )
    return Segment(name, None if steps is None else _positive("steps", steps), compute)
