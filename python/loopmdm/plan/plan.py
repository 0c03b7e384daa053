"""`ComputePlan`: one abstraction for loop schedules of a model and schedules of light and heavy models."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loopmdm.exits import ExitRule, make_rule
from loopmdm.model import flops
from loopmdm.model.loop_law import loop_count
from loopmdm.plan import storage
from loopmdm.plan import text as plan_text
from loopmdm.plan.compute import Segment, StepCompute, compute_of, make_compute
from loopmdm_kernels.files import write_file
from loopmdm_kernels.values import positive, whole


class Cost(NamedTuple):
    """FLOPs of one sequence, and the share saved against the costliest compute of the plan at every step."""

    flops: float
    saved: float


@dataclass(frozen=True)
class ComputePlan:
    """Consecutive segments of the denoising; index 0 is the fully masked end (t = 1).

    Make one with `constant`, `parse`, `segments`, `table`, `adaptive` or `by_mask_ratio`.

    Args:
        parts: the segments, or one without a number of steps.
        reading: "step", the number of the denoising step; "masks", a plan of n entries is read at n (1 - r),
            r the share of a sequence's positions to fill that are still masked.
    """

    parts: tuple[Segment, ...]
    reading: Literal["step", "masks"] = "step"

    @classmethod
    def constant(cls, num_loops: int) -> ComputePlan:
        """The same number of loops at every step."""
        loops = loop_count("num_loops", num_loops)
        return cls((Segment(f"S{loops}", None, StepCompute(num_loops=loops)),))

    @classmethod
    def adaptive(
        cls,
        eps: float | None = None,
        max_loops: int | None = None,
        min_loops: int = 1,
        criterion: str | ExitRule = "hidden",
    ) -> ComputePlan:
        """A sequence stops looping when a rule says so.

        Args:
            eps: threshold of the rule: "hidden", relative change of the hidden state; "output", nats between
                the predictions of two loops. The other rules take none.
            max_loops: the most loops; None: the model's max_loops.
            min_loops: the fewest.
            criterion: "hidden", "output", "argmax", or a rule of `loopmdm.exits`.
        """
        compute = make_compute(None, max_loops, make_rule(criterion, eps), min_loops)
        return cls((Segment("adaptive", None, compute),))

    @classmethod
    def table(cls, loops: Iterable[int]) -> ComputePlan:
        """One loop count per step, the fully masked end first."""
        return cls(_runs(loops))

    @classmethod
    def by_mask_ratio(cls, loops: Callable[[float], int] | Sequence[int], bins: int = 64) -> ComputePlan:
        """Loops from the share of a sequence's positions to fill that are still masked, whatever the step.

        Args:
            loops: S of a share in (0, 1], asked at the middle of each bin; or S of each bin, the fully masked
                end first.
            bins: of equal width, where `loops` is a function.
        """
        if callable(loops):
            count = positive("bins", bins)
            loops = [loops(1.0 - (index + 0.5) / count) for index in range(count)]
        return cls(_runs(loops), "masks")

    @classmethod
    def segments(cls, segments: Iterable[tuple[int, Any]]) -> ComputePlan:
        """Segments (steps, compute), the fully masked end first.

        A compute is a loop count, a model, a `StepCompute`, or a plan of one segment (`adaptive`). Plans name
        what is no loop count C1, C2 and so on.
        """
        parts: list[Segment] = []
        names: dict[StepCompute, str] = {}
        for number, (steps, choice) in enumerate(segments):
            if isinstance(choice, ComputePlan):
                if choice.num_steps is not None or choice.reading != "step":
                    raise ValueError(f"segment {number}: {choice} has steps of its own")
                choice = choice.parts[0].compute
            compute = compute_of(f"compute of segment {number}", choice)
            if compute == StepCompute(num_loops=compute.num_loops) and compute.num_loops is not None:
                name = f"S{compute.num_loops}"
            else:
                name = names.setdefault(compute, f"C{len(names) + 1}")
            parts.append(Segment(name, positive(f"steps of segment {number}", steps), compute))
        if not parts:
            raise ValueError("segments is empty, give at least one (steps, compute)")
        return cls(tuple(parts))

    @classmethod
    def parse(cls, text: str, light: Any = None, heavy: Any = None) -> ComputePlan:
        """Read a schedule such as `"L125,H750,L125"` or `"(S2:125,S12:750,S2:125)"`.

        `L` and `H` stand for light and heavy, each a loop count or a model; `Sn:k` is n loops for k steps.
        The forms may be mixed, and parentheses around the whole are optional.
        """
        return cls(plan_text.parse(text, light, heavy))

    @property
    def num_steps(self) -> int | None:
        """Steps the plan covers, or None when it fits any number of steps."""
        return None if self.reading == "masks" else self._entries

    @property
    def models(self) -> dict[str, Any]:
        """Models the plan names, by segment name; models given by loop counts only are not listed."""
        return {s.name: s.compute.model for s in self.parts if s.compute.model is not None}

    @property
    def computes(self) -> tuple[StepCompute, ...]:
        """The different computes of the plan."""
        return tuple(dict.fromkeys(part.compute for part in self.parts))

    def at(self, step: int, total_steps: int) -> StepCompute:
        """The compute of `step` in 0..total_steps - 1; step 0 is the fully masked end."""
        self.check_steps(total_steps)
        if self.reading == "masks":
            raise ValueError(f"the plan {self} goes by the share of masks: read it with `at_time`")
        if not 0 <= step < total_steps:
            raise ValueError(f"step must be in 0..{total_steps - 1}, got {step}")
        return self._entry(step)

    def at_time(self, time: float) -> StepCompute:
        """The compute at a time or a share of masks in [0, 1]: a plan of n entries read at n (1 - time)."""
        if not 0 <= time <= 1:
            raise ValueError(f"time must be in [0, 1], got {time}")
        entries = self._entries or 1
        return self._entry(min(int((1.0 - time) * entries), entries - 1))

    def check_steps(self, total_steps: int) -> None:
        """Raise ValueError unless the plan covers exactly `total_steps` steps."""
        if self.num_steps not in (None, total_steps):
            raise ValueError(
                f"the plan {self} covers {self.num_steps} steps, but sampling takes {total_steps} steps"
            )

    def ledger(
        self, config: flops.Dimensions, length: int, steps: int | None = None
    ) -> dict[flops.Convention, Cost]:
        """What the plan costs where every step runs the network once, under each FLOP convention.

        (L125,H750,L125) with 4 of 12 blocks saves 1/6 in the papers' convention, "blocks".

        Args:
            config: sizes of the model given to `sample`, for segments that are loop counts.
            length: tokens of the sequence.
            steps: denoising steps; None: those of the plan.

        Raises:
            ValueError: the plan depends on the data (an exit rule, shares of masks): `SampleResult.ledger`
                says what a run executed.
        """
        if self.reading == "masks" or any(part.compute.exit is not None for part in self.parts):
            raise ValueError(f"the plan {self} depends on the data: what it saves is known only after a run")
        total = steps if steps is not None else self.num_steps
        if total is None:
            raise ValueError(f"the plan {self} fits any number of steps: give steps")
        self.check_steps(positive("steps", total))
        counts = [total if part.steps is None else part.steps for part in self.parts]
        costs = {}
        for convention in flops.CONVENTIONS:
            each = []
            for part in self.parts:
                dims = config if part.compute.model is None else part.compute.model.config
                loops = part.compute.num_loops or dims.max_loops
                each.append(flops.forward_flops(dims, length, loops, convention))
            spent = sum(count * cost for count, cost in zip(counts, each, strict=True))
            costs[convention] = Cost(spent, 1.0 - spent / (total * max(each)))
        return costs

    def __str__(self) -> str:
        text = plan_text.write(self.parts)
        return text if self.reading == "step" else f"masks{text}"

    def __repr__(self) -> str:
        return f"<ComputePlan {self}>"

    def to_json(self) -> str:
        """The plan as JSON text. Models are stored by their segment name (L, H, C1), never their weights."""
        return storage.to_json(self.parts, self.reading)

    @classmethod
    def from_json(cls, text: str, models: Mapping[str, Any] | None = None) -> ComputePlan:
        """The plan written by `to_json`. models: one model for every name the plan stores."""
        parts, reading = storage.from_json(text, models or {})
        return cls(parts, "masks" if reading == "masks" else "step")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file, whole or not at all."""
        write_file(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], models: Mapping[str, Any] | None = None) -> ComputePlan:
        """The plan that `save` wrote. models: one model for every name the plan stores.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no plan, or one that needs other models.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), models)
        except UnicodeDecodeError:
            raise ValueError(
                f"{os.fspath(path)}: not a plan written by ComputePlan.to_json: no text"
            ) from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @cached_property
    def _ends(self) -> list[int]:
        """Where each segment ends; empty for a plan of any number of steps."""
        return list(accumulate(part.steps for part in self.parts if part.steps is not None))

    @property
    def _entries(self) -> int | None:
        return self._ends[-1] if self._ends else None

    def _entry(self, index: int) -> StepCompute:
        return self.parts[bisect_right(self._ends, index) if self._ends else 0].compute


def as_plan(plan: int | str | os.PathLike[str] | ComputePlan | None) -> ComputePlan:
    """The plan meant by an argument.

    None: the model's max_loops; an int: that many loops at every step; a string: a schedule of loop counts
    such as "S2:125,S12:875", or else the path of a file that `ComputePlan.save` wrote.
    """
    if plan is None:
        return ComputePlan((Segment("S_max", None, StepCompute()),))
    if isinstance(plan, ComputePlan):
        return plan
    if (loops := whole(plan)) is not None:
        return ComputePlan.constant(loops)
    if isinstance(plan, str) and plan.isdecimal():
        return ComputePlan.constant(int(plan))
    if isinstance(plan, str) and plan_text.looks_like_a_schedule(plan):
        return ComputePlan.parse(plan)
    if isinstance(plan, str) and (not plan or not Path(plan).exists()):
        raise ValueError(
            f"plan: {plan!r} is neither a loop count, nor a schedule such as S2:125,S12:875, nor a file"
        )
    if isinstance(plan, (str, os.PathLike)):
        return ComputePlan.load(plan)
    raise TypeError(
        f"plan must be None, a loop count, a ComputePlan, a schedule or a path, got {type(plan).__name__}"
    )


def _runs(loops: Iterable[int]) -> tuple[Segment, ...]:
    counts = [loop_count(f"loops[{index}]", count) for index, count in enumerate(loops)]
    if not counts:
        raise ValueError("loops is empty, give at least one loop count")
    runs = [(count, len(list(run))) for count, run in groupby(counts)]
    return tuple(Segment(f"S{count}", steps, StepCompute(num_loops=count)) for count, steps in runs)
