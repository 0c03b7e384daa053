"""Whatever the options are, a sequence is the same alone, in a batch and in batches of any size."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopmdm import ComputePlan, sample
from loopmdm.exits import ExitGate, HiddenChange
from loopmdm.sampling import ORDERS, Remasking

MASK = 11  # of the tests' small models: vocab_size 12, max_length 20
KINDS = {
    "rotary": {},
    "conditioned": {"time_conditioning": True},
    "wide": {"time_conditioning": True, "hidden_size": 32, "cond_dim": 32, "positions": "learned"},
}
ANY_PACE = ("steps", "tokens_per_step", "threshold", "entropy_bound")
PACES = dict.fromkeys(ORDERS, ANY_PACE) | {"ancestral": ("steps",), "first_hitting": ("tokens_per_step",)}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.integers(1, 24),
    "tokens_per_step": st.integers(1, 4),
    "threshold": st.sampled_from([0.0, 0.15, 0.4, 1.0]),
    "entropy_bound": st.sampled_from([0.0, 0.5, 2.0]),
}
GATE = ExitGate((0.5, 1.0, -0.5), -0.5)
RULES = [
    ComputePlan.adaptive(0.3, 4),
    ComputePlan.adaptive(None, 4, 2, criterion=HiddenChange(0.3, "old", "masked", "tokens")),
    ComputePlan.adaptive(0.02, 3, criterion="output"),
    ComputePlan.adaptive(max_loops=4, criterion="argmax"),
    ComputePlan.adaptive(max_loops=4, criterion=GATE),
    ComputePlan.by_mask_ratio([1, 4, 2, 3]),
]


@st.composite
def plans(draw: st.DrawFn, steps: int | None) -> Any:
    kind = draw(st.sampled_from(["none", "count", "rule", "table", "mixed"]))
    if kind == "none":
        return None
    if kind == "count":
        return draw(st.integers(1, 4))
    if kind == "rule":
        return draw(st.sampled_from(RULES))
    size = steps or draw(st.integers(2, 12))
    if kind == "table" or size < 2:
        return ComputePlan.table(draw(st.lists(st.integers(1, 4), min_size=size, max_size=size)))
    first = draw(st.integers(1, size - 1))
    return ComputePlan.segments([(first, draw(st.sampled_from(RULES[:5]))), (size - first, 2)])


@st.composite
def canvases(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What is given of each of 2 to 5 sequences: its length, and a prompt or an infill."""
    way = draw(st.sampled_from(["length", "prompt", "infill"]))
    rows: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(2, 5))):
        length = draw(st.integers(1, 20))
        token = st.integers(0, MASK - 1)
        if way == "infill":
            kept = st.one_of(token, st.just(MASK), st.just(MASK))
            rows.append({"infill": draw(st.lists(kept, min_size=length, max_size=length))})
        else:
            rows.append({"length": length})
        if way == "prompt":
            rows[-1]["prompt"] = draw(st.lists(token, max_size=length))
    return rows


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    order = draw(st.sampled_from(sorted(PACES)))
    options: dict[str, Any] = {"order": order, "seed": draw(st.integers(0, 2**40))}
    pace = draw(st.sampled_from([None, *PACES[order]]))
    if pace is not None:
        options[pace] = draw(VALUES[pace])
    if pace in (None, "steps") and order not in ("ancestral", "first_hitting"):
        options["counts"] = draw(st.sampled_from(["even", "llada"]))
    extra = draw(st.sampled_from(["", "block_length", "window", "remask", "reference_numerics"]))
    if extra == "block_length":
        options[extra] = draw(st.integers(1, 20))
    elif extra == "window" and order not in ("ancestral", "first_hitting"):
        options[extra] = draw(st.integers(1, 8))
    elif extra == "remask" and order == "ancestral":
        name = draw(st.sampled_from(["cap", "rescale", "conf", "loop"]))
        options[extra] = draw(st.sampled_from([name, Remasking(name, eta=0.6)]))
    elif extra == "reference_numerics" and order == "ancestral":
        options[extra] = True
    if not options.get("reference_numerics"):
        options["temperature"] = draw(st.sampled_from([0.0, 0.5, 1.0, 1.0, 1.7]))
        options["top_k"] = draw(st.sampled_from([None, None, 1, 4]))
        options["top_p"] = draw(st.sampled_from([1.0, 1.0, 0.5, 0.9]))
    options["forbidden"] = draw(st.sampled_from([None, [2, 5], list(range(1, 9))]))
    if "remask" not in options:
        options["eos_token_id"] = draw(st.sampled_from([None, None, 0, 4]))
    options["dtype"] = draw(st.sampled_from([None, None, torch.bfloat16]))
    options["skip_unchanged"] = draw(st.sampled_from([True, True, False]))
    options["plan"] = draw(plans(options.get("steps")))
    return options


@cache
def model_of(make: Any, kind: str) -> Any:
    return make(**KINDS[kind])


def outcome(model: Any, rows: list[dict[str, Any]], ids: list[int], options: dict[str, Any]) -> Any:
    given = {name: [row[name] for row in rows] for name in rows[0]}
    try:
        return sample(model, sequence_ids=ids, progress=False, **given, **options)
    except ValueError as error:
        return error


def check(model: Any, rows: list[dict[str, Any]], options: dict[str, Any], max_batch: int) -> bool:
    """Whether the options go together; then each sequence is what it is alone, and what it costs too."""
    ids = [7 + 3 * index for index in range(len(rows))]
    alone = [outcome(model, [row], [name], options) for row, name in zip(rows, ids, strict=True)]
    batches = [outcome(model, rows, ids, {**options, "max_batch": size}) for size in (None, max_batch)]
    refused = any(isinstance(out, ValueError) for out in alone)
    for out in batches:
        assert isinstance(out, ValueError) == refused, (out, alone)
        for index, single in enumerate(alone if not refused else []):
            size = single.tokens.shape[1]
            assert torch.equal(out.tokens[index, :size], single.tokens[0])
            for field in ("lengths", "network_calls", "loops"):
                assert torch.equal(getattr(out, field)[index], getattr(single, field)[0]), field
    return not refused


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rows=canvases(), options=option_sets(), max_batch=st.integers(1, 3))
def test_a_sequence_is_the_same_in_any_batch(make_model, kind, rows, options, max_batch):
    check(model_of(make_model, kind), rows, options, max_batch)


def test_a_window_bounds_the_sequence_that_needs_most(make_model):
    """The sequence with most to reveal a step decides, not the one with least."""
    with pytest.raises(ValueError, match="window is 1, but with steps=1 a step reveals up to 10 positions"):
        sample(model_of(make_model, "rotary"), length=[10, 1], order="confidence", steps=1, window=1)
