"""2 and 4 ranks learn what one process learns, in every form, also after a change of ranks and form."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import engine_runs
import pytest
import torch
from engine_runs import HALF, MICRO_BATCHES, STEPS, half, new_model, resume, run, trainer, weights
from safetensors.torch import load_file
from test_resume import files_limited_to
from torch import Tensor

from loopmdm import LoopMDM
from loopmdm.cli import main
from loopmdm.data.batches import Batch
from loopmdm.formats import safetensors_files
from loopmdm.train import CheckpointError, read_metrics
from loopmdm.train.loggers import scalars
from loopmdm.train.progress import describe_evaluation
from loopmdm_kernels.testing import assert_matches_oracle

FOUR = {
    "ddp4": {"parallel": "ddp", "evaluate": True},
    "fsdp4": {"parallel": "fsdp2"},
    "hsdp4": {"parallel": "hsdp", "shard_size": 2, "evaluate": True},
    "hsdp4-muon": {"parallel": "hsdp", "shard_size": 2, "optimizer": "muon"},
}
# Weights that have no gradient in a step of one loop, and a loss of every loop.
BETWEEN = {"inject": "add", "loop_embedding": 2, "carry_norm": True}
TWO = {
    "fsdp2": {"parallel": "fsdp2", "evaluate": True},
    "fsdp2-again": {"parallel": "fsdp2", "resumes": "fsdp2"},
    "ddp2-of-fsdp4": {"parallel": "ddp", "resumes": "fsdp4", "accumulation": 1},
    "fsdp2-of-ddp4": {"parallel": "fsdp2", "resumes": "ddp4", "accumulation": 1},
    "fsdp2-of-one": {"parallel": "fsdp2", "resumes": "one", "accumulation": MICRO_BATCHES},
    "fsdp2-muon": {"parallel": "fsdp2", "optimizer": "muon"},
    "fsdp2-muon-again": {
        "parallel": "fsdp2",
        "optimizer": "muon",
        "resumes": "hsdp4-muon",
        "accumulation": 1,
    },
    "ddp2-compiled": {"parallel": "ddp", "compile": True},
    "ddp2-truncated": {"parallel": "ddp", "backprop_loops": 1},
    "ddp2-between": {"parallel": "ddp", **BETWEEN, "loop_loss": "linear"},
    "fsdp2-between": {"parallel": "fsdp2", **BETWEEN, "loop_loss": "linear"},
}
# Single processes beside which those of the same words in their names are held: model, and training.
ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "muon": ({}, {"optimizer": "muon"}),
    "truncated": ({}, {"backprop_loops": 1}),
    "between": (BETWEEN, {"loop_loss": "linear"}),
}
REFUSED = {"refused": {"parallel": "fsdp2", "compile": True}}
CLOCK = {"clock": {"parallel": "ddp", "keep": 99, "checkpoint_every": 0, "checkpoint_minutes": 1e-9}}
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
    for name, (between, changes) in ALONE.items():
        torch.save(weights(run(folder / name, between, **changes)), folder / f"{name}.pt")
    for name, (between, changes) in {"one": ({}, {}), **ALONE}.items():
        double = trainer(folder / f"double-{name}", new_model(**between).double(), {}, **changes)
        double.train()
        torch.save(weights(double), folder / f"double-{name}.pt")
    jobs = json.dumps({4: FOUR, 2: TWO | CLOCK | TRAFFIC | REFUSED})
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
    alone = next((which for which in ALONE if which in name), "one")
    oracle, one = vector(runs, f"double-{alone}"), vector(runs, alone)
    begun = new_model(**ALONE[alone][0]) if alone in ALONE else new_model()
    assert (one - vector_of(begun)).abs().max() > 1e-2  # a step is 1e-3
    assert_matches_oracle(vector(runs, name), one, oracle)
    records, expected = (losses(runs / which) for which in (name, alone))
    same = ("step", "num_loops", "lr", "tokens", "flops")
    first = len(expected) - len(records)
    assert [[r[key] for key in same] for r in records] == [[r[key] for key in same] for r in expected[first:]]
    for figure, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [r[figure] for r in records] == pytest.approx([r[figure] for r in expected[first:]], rel=rel)


def losses(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("name", [name for name, job in (FOUR | TWO).items() if "evaluate" in job])
def test_ranks_measure_together_what_one_process_measures(runs: Path, name: str) -> None:
    """To the bit, on the averaged weights that the run leaves; best checkpoints go by it."""
    *_, last = (r for r in read_metrics(runs / name / "metrics.jsonl") if "evaluation" in r)
    alone = engine_runs.evaluation()(LoopMDM.from_pretrained(runs / name))
    assert last["step"] == STEPS and last["evaluation"] == json.loads(json.dumps(alone))
    assert [one["num_loops"] for one in alone["samples"]] == [1, 1, 2, 2, 4, 4]
    header = json.loads((runs / name / "checkpoints" / f"step-{STEPS:08d}" / "checkpoint.json").read_text())
    assert header["nll"] == min(one["nll"] for one in alone["held_out"])


def vector_of(model: LoopMDM) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_gradients_travel_once_a_step(runs: Path) -> None:
    """Of two micro-batches; in one bucket of ddp, and of fsdp2 once for each block and for the rest.

    So does their norm, which the ranks of fsdp2 add up.
    """
    printed = set(runs.joinpath("printed").read_text().splitlines())
    assert {line for line in printed if "traffic" in line} == {"traffic-ddp 1", "traffic-fsdp2 4 1"}


def test_compiled_passes_of_split_forms_are_refused(runs: Path) -> None:
    said = [line for line in runs.joinpath("printed").read_text().splitlines() if "refused" in line]
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("refused compile: not with fsdp2, whose hooks around blocks a graph leaves out")


def test_the_same_ranks_resume_bitwise(runs: Path) -> None:
    assert torch.equal(vector(runs, "fsdp2"), vector(runs, "fsdp2-again"))
    exported = [load_file(runs / name / "model.safetensors") for name in ("fsdp2", "fsdp2-again")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_checkpoints_by_the_clock_are_written_once(runs: Path) -> None:
    """The clock asks at every step, and its word takes one: every second is saved, not two in a row."""
    assert saved_steps(runs / "clock") == list(range(0, STEPS + 1, 2))


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_one_process_continues_what_four_began(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "fsdp4", tmp_path / "fsdp4")
    built = resume(half(tmp_path / "fsdp4", "alone"), {}, accumulation=1)
    got = torch.cat([value.flatten() for value in weights(built).values()])
    assert_matches_oracle(got, vector(runs, "one"), vector(runs, "double-one"))
    last = tmp_path / "alone" / "checkpoints" / f"step-{STEPS:08d}"
    assert last.is_dir() and not (tmp_path / "alone" / "training_state.safetensors").exists()


def test_ranks_that_cannot_share_a_step_are_refused(tmp_path: Path, runs: Path) -> None:
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


def measuring(*nlls: float) -> Callable[[LoopMDM], dict[str, object]]:
    """An evaluation that finds these."""
    values = iter(nlls)
    return lambda _: {"held_out": [{"num_loops": 1, "nll": next(values)}]}


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    options = {"keep": 2, "evaluate": measuring(3.0, 1.0, 2.0, 2.5, 2.6, 2.7)}
    run(tmp_path / "run", options, steps=12, eval_every=2, checkpoint_every=2)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000010", "step-00000012"]
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert LoopMDM.from_pretrained(tmp_path / "run").config.hidden_size == 16


def test_a_likelihood_that_is_not_finite_is_not_the_best(tmp_path: Path) -> None:
    """`None` in records, since JSON has no NaN."""

    def evaluate(_: LoopMDM) -> dict[str, object]:
        return {"held_out": [{"num_loops": 1, "nll": None}, {"num_loops": 2, "nll": next(nlls)}]}

    nlls = iter([2.0, None])
    options = {"keep": 9, "evaluate": evaluate}
    run(tmp_path / "run", options, steps=4, schedule="constant", eval_every=2, checkpoint_every=0)
    assert saved_steps(tmp_path / "run") == [0, 2, 4]
    headers = [
        json.loads(path.read_text())
        for path in sorted((tmp_path / "run").glob("checkpoints/*/checkpoint.json"))
    ]
    assert [header.get("nll") for header in headers] == [None, 2.0, None]
    evaluations = [r["evaluation"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "evaluation" in r]
    assert (
        describe_evaluation(4, evaluations[-1])
        == "step 4  evaluation: S 1 NLL not finite, S 2 NLL not finite"
    )
    assert [dict(scalars({"evaluation": one})) for one in evaluations] == [{"held_out/nll_S2": 2.0}, {}]


def test_a_checkpoint_of_its_own_is_written_for_the_best_alone(tmp_path: Path) -> None:
    """Also beside those that are due anyway, and after the run was resumed."""
    steps = {"steps": 16, "schedule": "constant", "eval_every": 2, "checkpoint_every": 4}
    first = measuring(3.0, 1.0, 2.0, 2.5)
    run(tmp_path / "run", {"keep": 99, "evaluate": first}, **steps | {"steps": 8})
    assert saved_steps(tmp_path / "run") == [0, 2, 4, 8]
    second = {"keep": 99, "evaluate": measuring(1.5, 1.2, 0.5, 0.6)}
    built = trainer(tmp_path / "run", new_model(), second, **steps)
    assert built.resume() == 8
    built.train()
    assert saved_steps(tmp_path / "run") == [0, 2, 4, 8, 12, 14, 16]


def test_resuming_leaves_a_checkpoint_as_it_is(tmp_path: Path) -> None:
    """That of a finished run keeps its NLL, and so its place; that of step 0 is not written again either."""

    def contents(name: str) -> dict[str, bytes]:
        folder = tmp_path / name / "checkpoints"
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}

    options = {"keep": 1, "evaluate": measuring(2.0, 1.0)}
    steps = {"steps": 4, "schedule": "constant", "eval_every": 2, "checkpoint_every": 0}
    run(tmp_path / "run", options, **steps)
    before = contents("run")
    (header,) = (json.loads(content) for name, content in before.items() if name.endswith("checkpoint.json"))
    assert header["nll"] == 1.0
    built = trainer(tmp_path / "run", new_model(), options, **steps)
    assert built.resume() == 4
    built.train()
    assert contents("run") == before

    built = trainer(tmp_path / "new", new_model(), {"keep": 9})
    built.request_stop()
    assert built.train().step == 1
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "step-00000001")
    before = contents("new")
    built = trainer(tmp_path / "new", new_model(), {"keep": 9})
    assert built.resume() == 0
    built.request_stop()
    built.train()
    after = contents("new")
    assert {name: after[name] for name in before} == before and len(after) == 2 * len(before)


@pytest.mark.parametrize("full", [False, True])
def test_an_error_waits_for_the_checkpoint_that_is_written(
    tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is free, whole and without leftovers then; a checkpoint that failed too is told."""
    write = safetensors_files.write

    def slowly(path: Path, *arguments: Any) -> None:
        if built.counters.step:
            time.sleep(0.5)
            no_space() if full else None
        write(path, *arguments)

    def source(step: int, *rest: int) -> Batch:
        if step == 2:
            raise FileNotFoundError("shard 3")
        return engine_runs.batches(step, *rest)

    monkeypatch.setattr(safetensors_files, "write", slowly)
    built = trainer(tmp_path, new_model(), {"keep": 9}, checkpoint_every=2)
    built._source = source
    told = pytest.warns(UserWarning, match="No space left on device") if full else nullcontext()
    with told, pytest.raises(FileNotFoundError, match="shard 3"):
        built.train()
    assert saved_steps(tmp_path) == ([0] if full else [0, 2]) and not list(tmp_path.glob("*.tmp"))


def test_a_failure_on_several_ranks_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.distributed.checkpoint raises what is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    def write(*_: object) -> None:
        raise CheckpointException("write", {1: (OSError("No space left on device"), [])})  # type: ignore[dict-item]

    monkeypatch.setattr(safetensors_files, "write", write)
    with pytest.raises(CheckpointError, match=r"previous ones are intact: No space left on device$"):
        trainer(tmp_path, new_model(), {"keep": 2}).train()
