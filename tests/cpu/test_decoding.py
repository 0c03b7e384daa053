"""What compiled steps refuse: they are given memory, so they look at sizes and indices themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm import sample
from loopmdm_kernels import _C
from tests.sampling.conftest import random_model

NETWORK = (
    *("embedding", "positions", "blocks", "modulation", "num_before", "num_after", "heads", "cos", "sin"),
    *("head", "excluded_token", "quantized"),
)
RUN = (
    *("network", "slots", "schedule", "place", "pace", "computes", "max_batch", "seed", "temperature"),
    "state",
)
PACE = ("none", "none", None, 1.0, 1)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.fixture(scope="module")
def given() -> dict[str, dict[str, Any]]:
    """The arguments of a run of one sequence of four masks, the schedule one slot a step."""
    found: dict[str, dict[str, Any]] = {}

    def kept(name: str, names: tuple[str, ...]) -> Any:
        real = getattr(_C, name)

        def make(*arguments: Any) -> Any:
            found[name] = dict(zip(names, arguments, strict=True))
            return real(*arguments)

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name, names in (("PreparedNetwork", NETWORK), ("DecodingRun", RUN)):
            patch.setattr(_C, name, kept(name, names))
        sample(random_model(positions="learned"), 1, 4, order="random")
    state = found["DecodingRun"]["state"]
    state[1].fill_(True)
    return found


def replaced(values: Any, index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def test_what_was_given_is_taken_again(given):
    network = _C.PreparedNetwork(**given["PreparedNetwork"])
    run = _C.DecodingRun(**{**given["DecodingRun"], "network": network})
    assert run.take_steps(0, 3, 1e6, 1)[:2] == (3, 3)
    assert run.take_steps(3, 9, 1e6, 1)[:2] == (1, 1)
    assert run.take_steps(4, 9, 1e6, 1)[:2] == (0, 0)
    given["DecodingRun"]["state"][1].fill_(True)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("embedding", lambda old: old.double(), TypeError),
        ("embedding", lambda old: old[:5], ValueError),
        ("positions", lambda old: old.bfloat16(), TypeError),
        ("blocks", lambda old: old[:-1], ValueError),
        ("blocks", lambda old: replaced(old, 1, old[1][:-1]), ValueError),
        ("modulation", lambda old: old[:-1], ValueError),
        ("num_before", lambda _: 4, ValueError),
        ("num_after", lambda _: -1, ValueError),
        ("heads", lambda _: 3, ValueError),
        ("head", lambda old: old[:-1], ValueError),
        ("head", lambda old: replaced(old, 5, None), TypeError),
        ("excluded_token", lambda _: 12, ValueError),
        ("excluded_token", lambda _: -1, ValueError),
        ("quantized", lambda _: ints(0), TypeError),
        ("quantized", lambda _: torch.zeros(3, dtype=torch.int32), ValueError),
    ],
)
def test_networks_that_are_refused(given, name, change, error):
    arguments = given["PreparedNetwork"]
    with pytest.raises(error):
        _C.PreparedNetwork(**{**arguments, name: change(arguments[name])})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("slots", lambda old: replaced(old, 0, ints(0, 0, 0, 1))),
        ("slots", lambda old: replaced(old, 1, ints(0, 1, 2, 4))),
        ("slots", lambda old: replaced(old, 2, ints(0, 0, 0, 2**32))),
        ("slots", lambda old: replaced(old, 3, ints(0, 0, 0))),
        ("schedule", lambda _: None),
        ("schedule", lambda old: (ints(0, 1, 2, 4), old[1])),
        ("schedule", lambda old: (old[0], ints(2, 1, 3, 4))),
        ("schedule", lambda old: (old[0], ints(1, 2, 3, 5))),
        ("pace", lambda _: replaced(PACE, 0, "unheard of")),
        ("pace", lambda _: replaced(PACE, 0, "place")),
        ("pace", lambda _: replaced(PACE, 4, 0)),
        ("computes", lambda old: replaced(old, 0, ints(1, 1, 0, 1))),
        ("computes", lambda old: replaced(old, 1, ints(1, 9, 1, 1))),
        ("computes", lambda old: replaced(old, 2, old[2][:3])),
        ("max_batch", lambda _: 0),
        ("temperature", lambda _: float("nan")),
        ("state", lambda old: replaced(old, 0, ints(0, 1, 2, 12)[None])),
        ("state", lambda old: replaced(old, 0, torch.zeros(1, 21, dtype=torch.int64))),
        ("state", lambda old: replaced(old, 7, old[7][:3])),
    ],
)
def test_runs_that_are_refused(given, name, change):
    network = _C.PreparedNetwork(**given["PreparedNetwork"])
    arguments = {**given["DecodingRun"], "network": network}
    with pytest.raises(ValueError):
        _C.DecodingRun(**{**arguments, name: change(arguments[name])})


def test_rated_predictions_have_probabilities(given):
    arguments = given["PreparedNetwork"]
    weight = torch.randn(arguments["embedding"].shape)
    quantized = torch.empty(_C.quantized_size(*weight.shape), dtype=torch.int32)
    _C.quantize_head(weight, False, 1, quantized, True)
    head = replaced(arguments["head"], 5, weight)
    network = _C.PreparedNetwork(**{**arguments, "head": head, "quantized": quantized})
    run = {**given["DecodingRun"], "network": network}
    _C.DecodingRun(**run)
    with pytest.raises(ValueError, match="drawn alone"):
        _C.DecodingRun(**{**run, "pace": replaced(PACE, 0, "confidence")})


@pytest.mark.parametrize("arguments", [(-1, 1, 1.0, 1), (5, 1, 1.0, 1), (0, 1, 1.0, 0)])
def test_steps_that_are_refused(given, arguments):
    network = _C.PreparedNetwork(**given["PreparedNetwork"])
    run = _C.DecodingRun(**{**given["DecodingRun"], "network": network})
    with pytest.raises(ValueError):
        run.take_steps(*arguments)
