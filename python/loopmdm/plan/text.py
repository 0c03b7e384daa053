"""The text of a plan: `L125,H750,L125` and `S2:125,S12:750,S2:125`, read and written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from loopmdm.model.loop_law import loop_count
from loopmdm.plan.compute import Segment, StepCompute, compute_of
from loopmdm_kernels.values import positive

_LETTERS = ("L", "H")
_LETTER = re.compile(r"([LH])(\d+)")
_LOOPS = re.compile(r"S(\d+):(\d+)")


def parse(text: Any, light: Any, heavy: Any) -> tuple[Segment, ...]:
    """The segments of a schedule; L and H stand for light and heavy."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string such as 'L125,H750,L125', got {type(text).__name__}")
    choices = {"L": ("light", light), "H": ("heavy", heavy)}
    segments = []
    for part in _parts(text):
        if match := _LETTER.fullmatch(part):
            letter, steps = match[1], int(match[2])
            name, choice = choices[letter]
            if choice is None:
                raise ValueError(
                    f"the plan uses {name}, but {name} is not given: pass {name}=<loop count or model>"
                )
            compute = compute_of(name, choice)
        elif match := _LOOPS.fullmatch(part):
            letter, steps = f"S{int(match[1])}", int(match[2])
            compute = StepCompute(num_loops=loop_count(f"loops of {part!r}", int(match[1])))
        else:
            raise ValueError(
                f"cannot read {part!r} in the plan {text!r}: accepted are L<steps>, H<steps>"
                " and S<loops>:<steps>, separated by commas"
            )
        segments.append(Segment(letter, positive(f"steps of {part!r}", steps), compute))
    return tuple(segments)


def looks_like_a_schedule(text: str) -> bool:
    """Whether the first part of the text is one of the grammar's."""
    first = _parts(text)[0]
    return bool(_LETTER.fullmatch(first) or _LOOPS.fullmatch(first))


def write(segments: Sequence[Segment]) -> str:
    """Segments as `parse` reads them, and behind them what the names stand for."""
    first = segments[0]
    if first.steps is None:
        return first.name if first.name.startswith("S") else str(first.compute)
    body = ",".join(f"{s.name}{'' if s.name in _LETTERS else ':'}{s.steps}" for s in segments)
    meaning = {s.name: str(s.compute) for s in segments if not s.name.startswith("S")}
    return f"({body})" + "".join(f" {name}={what}" for name, what in sorted(meaning.items()))


def _parts(text: str) -> list[str]:
    body = text.strip()
    if body.startswith("(") and body.endswith(")"):
        body = body[1:-1]
    return [part.strip() for part in body.split(",")]
