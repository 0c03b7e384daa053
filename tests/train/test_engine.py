"""2 and 4 ranks learn what one process learns, in every form, also after a change of ranks and form."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import engine_runs
import pytest
import torch
from engine_runs import HALF, MICRO_BATCHES, STEPS, half, new_model, resume, run, trainer, weights
from safetensors.torch import load_file
from test_resume import files_limited_to
from torch import Tensor

from loopmdm import LoopMDM
from loopmdm.cli import main
from loopmdm.formats import safetensors_files
from loopmdm.train import CheckpointError, read_metrics
from loopmdm_kernels.testing import assert_matches_oracle

FOUR = {
    "ddp4": {"parallel": "ddp"},
    "fsdp4": {"parallel": "fsdp2"},
    "hsdp4": {"parallel": "hsdp", "shard_size": 2},
}
TWO = {
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-again": {"parallel": "fsdp2", "resumes": "fsdp2"},
    "ddp2-of-fsdp4": {"parallel": "ddp", "resumes": "fsdp4", "accumulation": 1},
    "fsdp2-of-ddp4": {"parallel": "fsdp2", "resumes": "ddp4", "accumulation": 1},
    "fsdp2-of-one": {"parallel": "fsdp2", "resumes": "one", "accumulation": MICRO_BATCHES},
}
TRAFFIC = {f"traffic-{form}": {"parallel": form} for form in ("ddp", "fsdp2")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs side by side: FOLDER/NAME and, of several ranks, the last weights in FOLDER/NAME.pt."""
    folder = tmp_path_factory.mktemp("engine")
    built = trainer(folder / "one", new_model(), {}, steps=HALF)
    built.train()
    shutil.copy(folder / "one" / "training_state.safetensors", folder / "one" / "half.safetensors")
    built = trainer(folder / "one", new_model(), {})
    built.resume()
    built.train()
    torch.save(weights(built), folder / "one.pt")
    double = trainer(folder / "double", new_model().double(), {})
    double.train()
    torch.save(weights(double), folder / "double.pt")
    jobs = json.dumps({4: FOUR, 2: TWO | TRAFFIC})
    done = subprocess.run(
        [sys.executable, engine_runs.__file__, str(folder), jobs],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder.joinpath("printed").write_text(done.stdout)
    return folder


def vector(folder: Path, name: str) -> Tensor:
    return torch.cat([value.flatten() for value in torch.load(folder / f"{name}.pt").values()])


@pytest.mark.parametrize("name", [*FOUR, *TWO])
def test_ranks_learn_what_one_process_learns(runs: Path, name: str) -> None:
    oracle, one = vector(runs, "double"), vector(runs, "one")
    assert (one - vector_of(new_model())).abs().max() > 1e-2  # a step is 1e-3
    assert_matches_oracle(vector(runs, name), one, oracle)
    records, expected = (read_metrics(runs / which / "metrics.jsonl") for which in (name, "one"))
    same = ("step", "num_loops", "lr", "tokens", "flops")
    first = len(expected) - len(records)
    assert [[r[key] for key in same] for r in records] == [[r[key] for key in same] for r in expected[first:]]
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected[first:]], rel=1e-5)


def vector_of(model: LoopMDM) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_gradients_travel_once_a_step(runs: Path) -> None:
    """Of two micro-batches; in one bucket of ddp, and of fsdp2 once for each block and for the rest."""
    printed = set(runs.joinpath("printed").read_text().splitlines())
    assert printed == {"traffic-ddp 1", "traffic-fsdp2 4"}


def test_the_same_ranks_resume_bitwise(runs: Path) -> None:
    assert torch.equal(vector(runs, "fsdp2"), vector(runs, "fsdp2-again"))
    exported = [load_file(runs / name / "model.safetensors") for name in ("fsdp2", "fsdp2-again")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_one_process_continues_what_four_began(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "fsdp4", tmp_path / "fsdp4")
    built = resume(half(tmp_path / "fsdp4", "alone"), {}, accumulation=1)
    got = torch.cat([value.flatten() for value in weights(built).values()])
    assert_matches_oracle(got, vector(runs, "one"), vector(runs, "double"))
    last = tmp_path / "alone" / "checkpoints" / f"step-{STEPS:08d}"
    assert last.is_dir() and not (tmp_path / "alone" / "training_state.safetensors").exists()


def test_ranks_that_cannot_share_a_step_are_refused(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "fsdp4", tmp_path / "fsdp4")
    built = trainer(half(tmp_path / "fsdp4", "three"), new_model(), {}, accumulation=1)
    built.world_size = 3
    with pytest.raises(ValueError, match=r"is 4 micro-batches .* 3 ranks cannot share evenly"):
        built.resume()


def test_a_damaged_or_missing_shard_is_refused(tmp_path: Path, runs: Path) -> None:
    shutil.copytree(runs / "fsdp4", tmp_path / "fsdp4")
    folder = half(tmp_path / "fsdp4", "damaged")
    shard = sorted((folder / "checkpoints" / f"step-{HALF:08d}").glob("shard-00002-*"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00002-\S* is damaged: .* remove "):
        trainer(folder, new_model(), {}, accumulation=1).resume()
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00002-\S* is missing; .* remove "):
        trainer(folder, new_model(), {}, accumulation=1).resume()
    (folder / "checkpoints" / f"step-{HALF:08d}" / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint\.json.* remove "):
        trainer(folder, new_model(), {}, accumulation=1).resume()


def test_a_checkpoint_is_exported_on_demand(runs: Path, tmp_path: Path) -> None:
    assert main(["convert", str(runs / "fsdp4"), str(tmp_path / "out")]) == 0
    got, expected = (load_file(at / "model.safetensors") for at in (tmp_path / "out", runs / "fsdp4"))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert LoopMDM.from_pretrained(tmp_path / "out").config == LoopMDM.from_pretrained(runs / "fsdp4").config


@pytest.mark.parametrize("failure", ["no space", "file size limit"])
def test_a_full_disk_leaves_the_checkpoints_before(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "run", new_model(), {"keep": 2}, steps=HALF).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    built = trainer(tmp_path / "run", new_model(), {"keep": 2})
    assert built.resume() == HALF
    with (
        pytest.raises(CheckpointError, match="the previous ones are intact: "),
        monkeypatch.context() as patch,
    ):
        if failure == "no space":
            patch.setattr(safetensors_files, "write", no_space)
            built.train()
        else:
            with files_limited_to(20_000):
                built.train()
    after = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    assert after == before and not list((tmp_path / "run").glob("*.tmp"))
    again = trainer(tmp_path / "run", new_model(), {"keep": 2})
    assert again.resume() == HALF
    again.train()
    assert again.counters.step == STEPS


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    nlls = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])

    def evaluate(_: LoopMDM) -> dict[str, object]:
        return {"held_out": [{"num_loops": 1, "nll": next(nlls)}]}

    options = {"keep": 2, "evaluate": evaluate}
    run(tmp_path / "run", options, steps=12, eval_every=2, checkpoint_every=2)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000010", "step-00000012"]
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert LoopMDM.from_pretrained(tmp_path / "run").config.hidden_size == 16
