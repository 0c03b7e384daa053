"""Whatever the options are, a sequence is the same alone, in a batch and in batches of any size."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopmdm import sample
from tests.fuzz.sampler import KINDS, canvases, model_of, option_set


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


@pytest.mark.parametrize("kind", KINDS, ids=["rotary", "conditioned", "wide"])
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(rng=st.randoms(use_true_random=False), max_batch=st.integers(1, 3), skip=st.booleans())
def test_a_sequence_is_the_same_in_any_batch(
    kind: str, rng: random.Random, max_batch: int, skip: bool
) -> None:
    rows, options = canvases(rng), option_set(rng)
    check(model_of(kind), rows, {**options, "skip_unchanged": skip}, max_batch)


def test_a_window_bounds_the_sequence_that_needs_most():
    """The sequence with most to reveal a step decides, not the one with least."""
    with pytest.raises(ValueError, match="window is 1, but with steps=1 a step reveals up to 10 positions"):
        sample(model_of("rotary"), length=[10, 1], order="confidence", steps=1, window=1)
