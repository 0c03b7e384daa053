"""`loopmdm bench --tune`, on the CPU in the interpreter: every kernel's problem, tiny."""

import json

import pytest
import torch

from loopmdm.cli import bench as command
from loopmdm.cli import main
from loopmdm.speed import cases
from loopmdm_kernels.triton import tuning
from loopmdm_kernels.triton.config import KERNELS, Tiles, default_tiles, key, tiles
from loopmdm_kernels.triton.launch import processor
from loopmdm_kernels.triton.linear import linear
from loopmdm_kernels.triton.tuning import Problem, Workload, problems, tune

TINY = Workload(hidden=16, heads=1, vocab_size=20, batches=((1, 3),), rows=2)
OTHER = Tiles(16, 64, 16, 1, 1)


def tune_tiny(path, device, seen):
    candidates = {kernel: [OTHER] for kernel in KERNELS}
    return tune(path, TINY, device, candidates=candidates, repeats=1, report=seen.append)


def test_every_kernel_has_problems(device):
    """Each asks for the tiles of its own name and shape."""
    kernels = set()
    here = processor(device)
    for problem in problems(TINY, device):
        kernels.add(problem.kernel)
        name = key(problem.kernel, problem.shape, torch.bfloat16, here.arch)
        with tuning.trying({name: Tiles(0, 0, 0, 0, 0)}), pytest.raises(ZeroDivisionError):
            problem.call()
    assert kernels == set(KERNELS)


def test_the_table_goes_on_where_it_was(device, tmp_path, monkeypatch):
    """The best tiles are kept where they gain, the default elsewhere; entries are not timed twice."""
    a = torch.randn(4, 16).to(device, torch.bfloat16)
    two = [Problem("linear", (4, n, 16), lambda n=n: linear(a, a.new_ones(n, 16))) for n in (8, 12)]
    monkeypatch.setattr(tuning, "problems", lambda *_: two)
    default = default_tiles("linear", (4, 8, 16), torch.bfloat16, processor(device))
    names = [key("linear", problem.shape, torch.bfloat16, processor(device).arch) for problem in two]
    rounds = iter([{default: 1.0, OTHER: 0.5}, KeyboardInterrupt(), {default: 1.0, OTHER: 0.99}])

    def medians(calls, **_):
        for call in calls.values():
            call()
        result = next(rounds)
        if isinstance(result, BaseException):
            raise result
        return {str(tuple(tile)): seconds for tile, seconds in result.items()}

    monkeypatch.setattr(tuning, "interleaved_medians", medians)
    path, seen = tmp_path / "tiles.json", []
    with pytest.raises(KeyboardInterrupt):
        tune_tiny(path, device, seen)
    assert json.loads(path.read_text()) == {names[0]: list(OTHER)}
    table = tune_tiny(path, device, seen)
    assert table == {names[0]: OTHER, names[1]: default}
    assert len(seen) == 2 and seen[0].endswith("2.00 times the speed of the default")
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]
    monkeypatch.setenv("LOOPMDM_TRITON_TILES", str(path))
    assert tiles("linear", (4, 8, 16), torch.bfloat16, processor(device)) == OTHER


def test_the_command(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PRESETS, "tiny", {"hidden_size": 16, "num_heads": 1})
    monkeypatch.setattr(cases, "VOCABULARY", 20)
    monkeypatch.setattr(command, "_TUNED", {"batches": ((1, 3),), "rows": 2})
    monkeypatch.setattr(tuning, "interleaved_medians", lambda calls, **_: dict.fromkeys(calls, 1.0))
    for kernel in KERNELS:
        monkeypatch.setitem(tuning.CANDIDATES, kernel, [])
    path = tmp_path / "tiles.json"
    assert main(["bench", "--tune", str(path), "--preset", "tiny"]) == 0
    table = json.loads(path.read_text())
    assert {name.split()[0] for name in table} == set(KERNELS)
    assert f"LOOPMDM_TRITON_TILES={path} puts them to use" in capsys.readouterr().err
    path.write_text("[]")
    assert main(["bench", "--tune", str(path), "--preset", "tiny"]) == 1
    assert f"{path} is no table of tiles" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["bench", "--tune", str(tmp_path / "tiles.json")]) == 1
    assert capsys.readouterr().err == "loopmdm bench: error: --tune needs a GPU and Triton: no GPU\n"
    assert main(["bench", "--tune", "x", "--repeats", "0"]) == 2
