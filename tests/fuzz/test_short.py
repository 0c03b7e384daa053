"""The short form of `make fuzz`: some hundred cases of each kind, the same at every run."""

from __future__ import annotations

import pytest
import torch

from loopmdm_kernels import backends
from tests.fuzz import ops, sampler
from tests.fuzz.harness import Wrong, reproduction, run_seeds


@pytest.mark.parametrize("part", range(4))
def test_ops(part):
    counts = run_seeds(ops.case, range(60 * part, 60 * part + 60))
    assert sum(counts.values()) > 500


@pytest.mark.parametrize("part", range(2))
def test_sampler(part):
    counts = run_seeds(sampler.case, range(25 * part, 25 * part + 25))
    assert sum(counts.values()) == 25


@pytest.mark.parametrize("damage", ["value", "shape", "gradient", "bits", "refusal"])
def test_the_fuzzer_of_ops_finds_what_is_wrong(monkeypatch, damage):
    """A kernel that is off by a hundredth in one place, and so on; most cases of the op see it."""
    name = "looped_blocks" if damage == "gradient" else "head_logits"
    made = ops.OPS[name]

    def broken(problem):
        out = made.call(problem)
        if (
            backends.forced()
            or problem.leaves["weight" if "weight" in problem.leaves else "x"].dtype.itemsize == 8
        ):
            return out  # the oracle
        key, value = next(iter(out.items()))
        if damage == "value":
            value = value + 0.3 * (value == value.max())
        elif damage == "shape":
            value = value[:, :0]
        elif damage == "gradient":
            value = value.detach() + (value - value.detach()) * 1.5
        elif damage == "bits":
            value = value * (1 + 1e-6 * torch.rand(()))
        elif damage == "refusal":
            raise RuntimeError("not by name")
        return {**out, key: value}

    monkeypatch.setattr(ops, "OPS", {name: made._replace(call=broken)})
    found = 0
    for seed in range(12):
        try:
            ops.case(seed)
        except (Wrong, RuntimeError):
            found += 1
    assert found >= 6


def test_a_failure_says_how_to_repeat_it():
    def case(seed):
        raise ValueError("bad")

    case.__module__ = "tests.fuzz.ops"
    with pytest.raises(Wrong, match=r"python -m tests.fuzz.ops --seed 7\nValueError: bad"):
        run_seeds(case, [7])
    assert reproduction("files", 3) == "python -m tests.fuzz.files --seed 3"
