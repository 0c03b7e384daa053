"""`loopmdm doctor` and `loopmdm demo`."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm.cli import demo, doctor
from loopmdm.runs import models
from loopmdm_kernels import _C
from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.cpu import attention as cpu_attention
from loopmdm_kernels.reference.head_logits import row_logits, subs_log_probs

from .conftest import Call


@pytest.fixture
def with_models(shipped: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.setattr(models, "shipped_folder", shipped)
    monkeypatch.setattr(doctor, "shipped_folder", shipped)
    return shipped


def test_doctor_reports_this_machine(call: Call, with_models: Callable[[str], Path]) -> None:
    done = call("doctor", "--json")
    document = done.json
    assert done.status == 0 and document["problems"] == [], document
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["loopmdm"] == lk.__version__
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["machine"]["thread_runtime"] == _C.thread_runtime()
    assert {n: f["status"] for n, f in document["backends"].items()} == lk.available_backends()
    for name in ("reference", "cpu"):
        assert document["backends"][name]["usable"] and document["backends"][name]["checked"]
    for name, finding in document["checkpoints"].items():
        weights = (with_models(name) / "model.safetensors").read_bytes()
        assert finding["sha256"] == hashlib.sha256(weights).hexdigest() and finding["parameters"] > 0
    plain = call("doctor")
    assert plain.status == 0 and plain.err == ""
    assert "equals the reference" in plain.out and "sudoku9" in plain.out


def test_doctor_prints_the_size_of_the_package(call: Call, with_models: Callable[[str], Path]) -> None:
    package = call("doctor", "--json").json["package"]
    folder = Path(lk.__file__).parent
    assert str(folder) in package["folders"]
    module = Path(_C.__file__).stat().st_size
    assert module < package["bytes"]["loopmdm_kernels"] < module + 2**24
    total = sum(package["bytes"].values())
    assert package["total"] == f"{total / 1e6:.1f} MB"


def test_self_test_covers_all_that_a_backend_does(call: Call, with_models: Callable[[str], Path]) -> None:
    document = call("doctor", "--self-test", "--json").json
    found = document["self_test"]
    assert document["problems"] == []
    assert {name for name, finding in found.items() if finding["tested"]} >= {
        f"cpu {op} {direction} {dtype}"
        for op in ("attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows")
        for direction in ("forward", "gradients")
        for dtype in ("float32", "bfloat16")
        if (op, direction) != ("sample_rows", "gradients")
    }
    assert found["cpu attention forward float16"] == {"tested": False, "problem": None}
    plain = call("doctor", "--self-test")
    assert plain.status == 0 and "cpu looped_blocks gradients bfloat16" in plain.out


def test_self_test_finds_a_wrong_kernel(
    call: Call, with_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cpu_attention.run
    monkeypatch.setattr(cpu_attention, "run", lambda call: run(call) + 0.01)
    done = call("doctor", "--self-test")
    assert done.status == 1
    assert re.search(
        r"loopmdm doctor: self-test cpu attention forward float32: 37 tokens, angles: out: error .*", done.err
    )
    assert "self-test cpu looped_blocks" not in done.err


def test_doctor_names_a_bad_setting(
    call: Call, with_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPMDM_CPU_THREADS", "many")
    done = call("doctor")
    assert done.status == 1
    assert "loopmdm doctor: backend cpu: LOOPMDM_CPU_THREADS: got 'many'; expected 'std'" in done.err


def test_doctor_finds_what_is_broken(
    call: Call, with_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = lk.sample_rows
    calls = []

    def wrong(*args: Any, **options: Any) -> Any:
        calls.append(args)
        sampled = draw(*args, **options)
        # The second draw of a pair is the backend's; the fourth that of the CPU kernel.
        return sampled._replace(token=sampled.token + 1) if len(calls) == 4 else sampled

    monkeypatch.setattr(lk, "sample_rows", wrong)
    monkeypatch.setattr(doctor, "shipped_folder", lambda name: tmp_path)
    done = call("doctor")
    assert done.status == 1 and done.err.count("\n") == 3
    assert "loopmdm doctor: backend cpu: sample_rows: token differs from the reference by up to 1" in done.err
    assert "loopmdm doctor: checkpoint sudoku9: " in done.err and "model.safetensors" in done.err


@pytest.fixture
def short_demo(with_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PUZZLES", {"sudoku9": 2, "sudoku6": 3})
    monkeypatch.setattr(demo, "_TRAINING_STEPS", 4)
    monkeypatch.setattr(demo, "_STEPS_A_LINE", 2)
    monkeypatch.setattr(demo, "_SPEED_SHAPE", {"rows": 5, "hidden_size": 32, "vocab_size": 99})


@pytest.mark.parametrize(
    ("error", "is_problem"),
    [
        ("backend 'cuda' was asked for and cannot do this: compute_dtype must be bfloat16", False),
        ("CUDA error: an illegal memory access was encountered", True),
    ],
)
def test_doctor_leaves_out_what_a_backend_refuses(
    error: str, is_problem: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(doctor, "_compare", refuse)
    monkeypatch.setattr(doctor.lk, "use_backend", lambda name: contextlib.nullcontext())
    finding = doctor._check_backend("cuda", True)
    assert finding["usable"] and not finding["checked"]
    assert finding["problem"] == (error if is_problem else None)


def test_demo_prints_boards_losses_and_speed(call: Call, short_demo: None) -> None:
    done = call("demo")
    assert done.status == 0, done.err
    assert "\033" not in done.out
    for text in (
        "Solving 9x9 Sudoku with the shipped model sudoku9",
        "left to right, S = 1        left to right, S = 2        confidence, S = 2",
        "Share of 3 held-out puzzles solved",
        "steps   1 to   2: loss ",
        "5 rows, hidden size 32, vocabulary 99, fp32",
        "  ratio ",
    ):
        assert text in done.out
    assert done.out.count("+-------+-------+-------+   +-------+-------+-------+   +-------") == 4
    verdicts = [line.split() for line in done.out.splitlines() if line.startswith(("wrong ", "solved "))]
    assert [len(words) for words in verdicts] == [3, 3]


def test_demo_figures(call: Call, short_demo: None) -> None:
    done = call("demo", "--json")
    assert done.status == 0, done.err
    document = done.json
    assert [part["model"] for part in document["sudoku"]] == ["sudoku9", "sudoku6"]
    for part in document["sudoku"]:
        assert [(s["order"], s["num_loops"]) for s in part["solved"]] == [
            ("left_to_right", 1),
            ("left_to_right", 2),
            ("confidence", 1),
            ("confidence", 2),
        ]
    training = document["training"]
    assert len(training["losses"]) == 4
    assert training["average_losses"] == [sum(training["losses"][i : i + 2]) / 2 for i in (0, 2)]
    speed = document["speed"]
    assert speed["ratio"] == speed["plain_seconds"] / speed["fused_seconds"] > 0
    assert speed["instruction_set"] == lk.available_backends()["cpu"]


def test_demo_without_checkpoints(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    done = call("demo")
    assert done.status == 1 and "the checkpoint sudoku9 does not come with this installation" in done.err


def test_the_timed_reference_draws_from_the_same_law() -> None:
    """Both sides of the comparison are exact draws: frequencies agree with the probabilities."""
    generator = torch.Generator().manual_seed(0)
    head = lk.types.Head(
        torch.ones(8),
        torch.randn(6, 8, generator=generator),
        torch.zeros(6),
        torch.randn(1, 2, 8, generator=generator),
        5,
    )
    hidden = torch.randn(1, 8, generator=generator)
    rows = torch.arange(20_000)
    names = lk.types.RowRng(0, torch.zeros_like(rows), torch.zeros_like(rows), rows)
    copies = hidden.expand(1, 20_000, 8).contiguous()
    torch.manual_seed(0)
    for tokens in (demo._plain_draw(copies[0], head), lk.sample_rows(copies, head, rows, names).token):
        shares = tokens.bincount(minlength=6) / 20_000
        expected = subs_log_probs(row_logits(HeadCall(copies[:, :1], head, None), rows[:1]), 5)
        torch.testing.assert_close(shares, expected[0].exp(), atol=0.02, rtol=0)
