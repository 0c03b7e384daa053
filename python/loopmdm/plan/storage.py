"""Plans as JSON text. A model is stored by its name in the plan, never its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loopmdm.exits import ExitRule
from loopmdm.plan.compute import Segment, make_compute
from loopmdm_kernels.values import parse_json, positive

READINGS = ("step", "masks")


def to_json(segments: Sequence[Segment], reading: str) -> str:
    rows = [
        {
            "name": segment.name,
            "steps": segment.steps,
            "model": None if segment.compute.model is None else segment.name,
            "num_loops": segment.compute.num_loops,
            "exit": None if segment.compute.exit is None else segment.compute.exit.to_dict(),
            "min_loops": segment.compute.min_loops,
        }
        for segment in segments
    ]
    return json.dumps({"reading": reading, "segments": rows})


def from_json(text: str, models: Mapping[str, Any]) -> tuple[tuple[Segment, ...], str]:
    """Segments and reading of a plan; models holds one for every name that the plan stores."""
    try:
        document = _parsed(text)
        reading = document["reading"]
        segments = tuple(_segment_of(row, models) for row in document["segments"])
    except (KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"not a plan written by ComputePlan.to_json: {why}") from error
    if reading not in READINGS:
        raise ValueError(f"a plan is read by {' or '.join(READINGS)}, got {reading!r}")
    endless = [segment.steps is None for segment in segments]
    if not segments or (any(endless) and (len(segments) > 1 or reading == "masks")):
        raise ValueError("a plan needs one segment without a step count, or segments that all have one")
    return segments, reading


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise TypeError(f"no JSON: {error}") from None


def _segment_of(row: Mapping[str, Any], models: Mapping[str, Any]) -> Segment:
    name, steps = row["name"], row["steps"]
    if not isinstance(name, str):
        raise TypeError(f"a segment's name must be a string, got {name!r}")
    model = None
    if row["model"] is not None:
        if row["model"] not in models:
            raise ValueError(f"the plan needs the model {row['model']!r}, given are {sorted(models)}")
        model = models[row["model"]]
    rule = None if row["exit"] is None else ExitRule.from_dict(row["exit"])
    compute = make_compute(model, row["num_loops"], rule, row["min_loops"])
    return Segment(name, None if steps is None else positive("steps", steps), compute)
