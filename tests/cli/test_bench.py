"""`loopmdm bench` without --tune: what it times and prints, tiny."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm.cli import bench as command
from loopmdm.speed import cases, measure

from .conftest import Call

OPS = {
    "looped_blocks",
    "looped_blocks, gradients",
    "masked_cross_entropy, gradients",
    "sample_rows",
}
WORDS = ("bench", "--preset", "tiny", "--length", "4", "--loops", "1", "--rows", "2", "--repeats", "1")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.PRESETS, "tiny", {"hidden_size": 16, "num_heads": 2})
    monkeypatch.setattr(cases, "VOCABULARY", 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures(call: Call, dtype: str) -> None:
    done = call(*WORDS, "--json", "--device", "cpu", "--dtype", dtype)
    document = json.loads(done.out)
    assert done.status == 0 and document["dtype"] == dtype and document["length"] == 4
    assert document["figures"].keys() == OPS
    for figures in document["figures"].values():
        ms = figures["ms"]
        assert ms.keys() == {"cpu", "reference"} and all(value > 0 for value in ms.values())
        assert figures["spread"] == {"cpu": 0, "reference": 0}  # of one turn
        assert figures["gflops"].keys() == ms.keys()
        assert figures["share_of_peak"] == pytest.approx(
            figures["gflops"]["cpu"] / document["peak_gflops"], abs=0.001
        )
        assert figures["ratio"] == pytest.approx(ms["reference"] / ms["cpu"], rel=0.1, abs=0.05)


def test_operations_are_those_of_the_mathematics(call: Call) -> None:
    """Two a multiply-add: 12 D^2 of a block, and attention; D V of the head; gradients take twice as much."""
    document = json.loads(call(*WORDS, "--json", "--device", "cpu").out)
    d, length, vocabulary = 16, 4, 40
    blocks = 2 * (2 * 12 * d * d * length + 4 * length * length * d)
    flops = {
        "looped_blocks": blocks,
        "looped_blocks, gradients": 3 * blocks,
        "masked_cross_entropy, gradients": 3 * 2 * (length // 2) * d * vocabulary,
        "sample_rows": 2 * 2 * d * vocabulary,
    }
    for name, figures in document["figures"].items():
        assert figures["flops"] == flops[name], name
        assert figures["gflops"]["cpu"] == pytest.approx(flops[name] / figures["ms"]["cpu"] / 1e6, rel=0.05)
    assert document["figures"]["looped_blocks"]["shape"] == "x [1, 4, 16], 2 blocks, S 1"
    assert document["figures"]["masked_cross_entropy, gradients"]["shape"] == "2 of 4 rows, D 16, V 40"


def test_spread_is_the_range_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"cpu": [0.010, 0.012, 0.011], "reference": [0.02, 0.02, 0.03]}
    monkeypatch.setattr(measure, "interleaved_times", lambda *_, **__: times)
    case = cases.Case("", "", "", lambda: torch.ones(2, 3) @ torch.ones(3, 5), lambda _: lambda: None, 1)
    figures = measure.figure(case, "cpu", 3)
    assert figures["ms"] == {"cpu": 11.0, "reference": 20.0}
    assert figures["spread"] == {"cpu": 0.182, "reference": 0.5}
    assert figures["ratio"] == 1.82
    assert figures["gflops"]["cpu"] == float(f"{60 / 0.011 / 1e9:.5g}")


def test_table(call: Call) -> None:
    done = call(*WORDS, "--device", "cpu")
    assert done.status == 0
    machine, heading, _, *lines = done.out.splitlines()
    assert machine.startswith("cpu (") and "thread" in machine and "GFLOP/s in float32" in machine
    columns = ["shape", "cpu,", "ms", "spread", "PyTorch,", "ms", "spread", "ratio", "GFLOP/s", "of", "peak"]
    assert heading.split() == columns
    assert len(lines) == len(OPS) and all(line.endswith("%") for line in lines)
    # Before each of them, so that nobody waits for minutes without a word.
    assert [f"  {name}: " in done.err for name in OPS] == [True] * len(OPS)
    assert "x [1, 4, 16], 2 blocks, S 1" in lines[0] and "x [1, 4, 16], 2 blocks, S 1" in done.err


def test_a_backend_that_is_not_here(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = call(*WORDS, "--device", "cpu", "--backend", "triton")
    assert done.status == 1 and "backend 'triton' cannot be used here: no GPU" in done.err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, little memory to read."""
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    monkeypatch.setattr(measure, "_READ_BYTES", 2**16)
    monkeypatch.setattr(measure, "LOOPS", (1, 2))
    monkeypatch.setattr(measure, "MEMORY_LOOPS", (1, 2))


def test_page(call: Call, quick: None, tmp_path: Path) -> None:
    """It holds every figure and what it is of, fetches nothing, and replaces only what it has written."""
    path = tmp_path / "report.html"
    words = (*WORDS, "--device", "cpu", "--dtype", "bfloat16", "--html", path)
    document = json.loads(call(*words, "--json").out)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|src=|url\(|@import|https?:", text)
    assert text.count("<svg") == 7 and "nan" not in text
    for title in ("Speed-ups", "Roofline", "Cost against", "Memory against", "Error against"):
        section = text.partition(f"<h2>{title}")[2].partition("</section>")[0]
        assert html.escape(document["provenance"]["command"]) in section and torch.__version__ in section
    for name, figure in document["figures"].items():
        peers = {"reference", "eager fp32", "compiled"} | (set() if "looped" in name else {"eager"})
        assert set(figure["speedups"]) == peers, name
        assert all(f"<td>{figure['gflops'][which]:.4g}</td>" in text for which in figure["gflops"])
    assert document["errors"]["error"].keys() == {"cpu", "reference"}
    assert document["series"]["loops"]["at"] == [1, 2]
    assert document["series"]["batch"]["fixed"] == {"loops": 1, "length": 2}

    assert call(*words).status == 0
    path.write_text("something else")
    done = call(*words)
    assert done.status == 2 and "did not write" in done.err and path.read_text() == "something else"


def test_a_compiler_that_fails_is_told(
    call: Call, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Any:
        def run(*_: object) -> None:
            raise RuntimeError("no C++ compiler\nat all")

        return run

    monkeypatch.setattr("torch.compile", fails)
    path = tmp_path / "report.html"
    document = json.loads(call(*WORDS, "--device", "cpu", "--html", path, "--json").out)
    assert document["missing"] == dict.fromkeys(OPS, "RuntimeError: no C++ compiler")
    assert "not timed: RuntimeError: no C++ compiler" in path.read_text(encoding="utf-8")


def test_comparison(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    old = json.loads(call(*WORDS, "--device", "cpu", "--json").out)
    old["figures"]["sample_rows"]["speedup"] = [1e-9, 1e-9, 1e-9]
    path.write_text(json.dumps(old))
    done = call(*WORDS, "--device", "cpu", "--compare", path)
    *_, last = done.out.splitlines()
    assert done.status == 0 and last.startswith("sample_rows") and "faster" in last
    assert json.loads(call(*WORDS, "--device", "cpu", "--compare", path, "--json").out)["moved"].keys() == OPS

    done = call(*WORDS, "--device", "cpu", "--compare", path, "--dtype", "bfloat16")
    assert done.status == 2 and "dtype float32 then, bfloat16 now" in done.err
