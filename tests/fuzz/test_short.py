"""The short form of `make fuzz`: some hundred cases of each kind, the same at every run."""

from __future__ import annotations

import os

import pytest
import torch

import tests.fuzz.__main__ as long_form
from loopmdm_kernels import backends
from tests.fuzz import files, ops, sampler, soak, threads
from tests.fuzz.harness import Wrong, reproduction, run_seeds


@pytest.mark.parametrize("part", range(4))
def test_ops(part):
    counts = run_seeds(ops.case, range(60 * part, 60 * part + 60))
    assert sum(counts.values()) > 500


@pytest.mark.parametrize("part", range(2))
def test_sampler(part):
    counts = run_seeds(sampler.case, range(25 * part, 25 * part + 25))
    assert sum(counts.values()) == 25


@pytest.mark.parametrize("part", range(3))
def test_files(part):
    counts = run_seeds(files.case, range(150 * part, 150 * part + 150))
    assert counts["refused files"] > 80 and counts["read files"] > 10


def test_threads():
    assert run_seeds(threads.case, range(1)).total() > 50


def test_soak(tmp_path):
    """Two rounds give the same bits; the slope of a straight line is found."""
    assert soak.round_of_work(tmp_path) == soak.round_of_work(tmp_path)
    assert soak.slope([1.0, 2.0, 4.0], [10.0, 13.0, 19.0]) == pytest.approx(3.0)
    assert soak.resident() > 10


def test_the_fuzzer_of_files_finds_what_is_wrong(monkeypatch):
    """A reader that takes damaged weights, one that says so in another way, one that starts a process."""

    def outcome(read):
        made = files.originals()["weights with a digest"]
        monkeypatch.setattr(files, "originals", lambda: {"weights with a digest": made._replace(read=read)})
        found = 0
        for seed in range(10):
            try:
                files.case(seed)
            except Wrong:
                found += 1
        monkeypatch.undo()
        return found

    whole = files.originals()["weights with a digest"].read

    def careless(folder):
        return {"x": torch.zeros(1)}

    def unclear(folder):
        try:
            return whole(folder)
        except ValueError as error:
            raise KeyError(str(error)) from error

    def executing(folder):
        os.system("true")
        return whole(folder)

    def colourful(folder):
        raise ValueError("\x1b[31mred")

    assert all(outcome(read) > 5 for read in (careless, unclear, executing, colourful))
    assert outcome(whole) == 0


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


def test_a_worker_that_dies_or_hangs_is_told_of_and_replaced(monkeypatch, capsys):
    monkeypatch.setattr(long_form, "KINDS", {"troubled": long_form.Kind(1, 0.2)})
    run = long_form.Run(0, 4 / 60, None)
    run.worker("troubled", 0)
    run.table()
    told = run.failures["troubled"]
    assert [line.partition("\n")[0] for line in told] == [reproduction("troubled", at) for at in (3, 5, 7)]
    for text, line in zip(
        ("crashes: exit status -6", "hangs: no end within 0.2 s", "ValueError: no"), told, strict=True
    ):
        assert text in line
    assert (run.crashes["troubled"], run.hangs["troubled"]) == (1, 1)
    assert run.counts["troubled"]["calls"] > 3
    assert "FAILED python -m tests.fuzz.troubled --seed 3" in capsys.readouterr().out
