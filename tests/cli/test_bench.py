"""`loopmdm bench` without --tune: what it times and prints, tiny."""

import json

import pytest

from loopmdm.cli import bench as command

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
    monkeypatch.setattr(command, "VOCABULARY", 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures(call: Call, dtype: str) -> None:
    done = call(*WORDS, "--json", "--device", "cpu", "--dtype", dtype)
    document = json.loads(done.out)
    assert done.status == 0 and document["dtype"] == dtype and document["length"] == 4
    assert document["figures"].keys() == OPS
    for figures in document["figures"].values():
        ms = figures["ms"]
        assert ms.keys() == {"cpu", "reference"} and all(value > 0 for value in ms.values())
        assert figures["ratio"] == pytest.approx(ms["reference"] / ms["cpu"], rel=0.1, abs=0.05)


def test_table(call: Call) -> None:
    done = call(*WORDS, "--device", "cpu")
    assert done.status == 0
    heading, _, *lines = done.out.splitlines()
    assert heading.split() == ["cpu,", "ms", "PyTorch,", "ms", "ratio"]
    assert len(lines) == len(OPS)


def test_a_backend_that_is_not_here(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = call(*WORDS, "--device", "cpu", "--backend", "triton")
    assert done.status == 1 and "backend 'triton' cannot be used here: no GPU" in done.err
