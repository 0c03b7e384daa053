"""Arms: models trained on one budget of FLOPs, each in a folder that `loopmdm train` could have written.

An arm is stopped by its budget, not by a number of steps: the loop counts a run will draw are known
beforehand (`LoopLaw.sample`), so its cost is summed exactly and the arms of a study agree to within a step.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loopmdm.model import LoopMDM, flops
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.flops import DEFAULT_CONVENTION, Convention, Dimensions
from loopmdm.model.loop_law import LoopLaw
from loopmdm.runs.jobs import Job, corpus_job, sudoku_job, text_job, text_tokenizer
from loopmdm.runs.options import usage_errors
from loopmdm.runs.recipes import SUDOKU_RECIPES
from loopmdm.runs.run_file import FILES, RunFile, replaced_by
from loopmdm.runs.text_data import are_corpora
from loopmdm.train import RunFolder, Trainer
from loopmdm_kernels.files import refuse_files

# Fields of `TrainConfig` that no weight depends on: an arm that `loopmdm train` has begun may have others.
_CADENCE = ("checkpoint_every", "checkpoint_minutes", "eval_every", "log_every", "spike")


@dataclass(frozen=True)
class Arm:
    """One model of a comparison: its name and the fields of `LoopMDMConfig` that differ from the study's."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """Training FLOPs of an arm, under a convention of `loopmdm.model.flops`."""

    flops: float
    convention: Convention = DEFAULT_CONVENTION

    def __post_init__(self) -> None:
        if not 0 < self.flops < math.inf:
            raise ValueError(f"flops must be positive and finite, got {self.flops}")
        if self.convention not in flops.CONVENTIONS:
            accepted = ", ".join(map(repr, flops.CONVENTIONS))
            raise ValueError(f"convention is {self.convention!r}; accepted: {accepted}")


def iso_flop_arms(config: LoopMDMConfig, expected_loops: float) -> list[Arm]:
    """The model without its loop, one as deep as its step is dear (`equal_depth`), the looped one."""
    depth = flops.equal_depth(config.num_layers, config.loop_end - config.loop_start, expected_loops)
    return [
        Arm("base", {"max_loops": 1}),
        Arm("deep", {"max_loops": 1, "num_layers": depth}),
        Arm("loop"),
    ]


def position_arms(config: LoopMDMConfig) -> list[Arm]:
    """The same number of looped layers at different places, and all layers looped.

    Early-middle starts after the first layer, as in LoopMDM. In a shallow model places coincide; each range
    of layers is there once, under its first name.
    """
    layers, looped = config.num_layers, config.loop_end - config.loop_start
    if looped >= layers:
        raise ValueError(
            f"the model loops {looped} of its {layers} layers: a loop of all layers has no other place; "
            "give more layers or a shorter loop"
        )
    starts = {"early": 0, "early-middle": 1, "middle": (layers - looped) // 2, "late": layers - looped}
    ranges = {name: (start, start + looped) for name, start in starts.items()} | {"all": (0, layers)}
    names = {where: name for name, where in reversed(ranges.items())}
    return [
        Arm(name, {"loop_start": start, "loop_end": end})
        for name, (start, end) in ranges.items()
        if names[start, end] == name
    ]


def steps_within(budget: Budget, config: Dimensions, length: int, batch: int, law: LoopLaw, seed: int) -> int:
    """Optimizer steps of `batch` sequences closest to the budget, with the loops the run will draw."""
    cost = {
        loops: batch * flops.training_flops(config, length, loops, budget.convention)
        for loops in range(1, law.largest + 1)
    }
    spent, step = 0.0, 0
    while spent + (following := cost[law.sample(seed, step)]) / 2 <= budget.flops:
        spent, step = spent + following, step + 1
    if not step:
        raise ValueError(
            f"a budget of {budget.flops:g} FLOPs does not pay for one step of {batch} sequences, which costs"
            f" {following:g} ({budget.convention})"
        )
    return step


@dataclass(frozen=True)
class TrainedArm:
    """A finished arm. `flops` are the executed training FLOPs under every convention."""

    name: str
    seed: int
    model: LoopMDM
    run: RunFile
    steps: int
    length: int
    expected_loops: float
    flops: dict[Convention, float]
    cpu_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What a row of a table says about an arm."""
        config = self.model.config
        batch = self.run.training["batch_size"] * self.run.training["accumulation"]
        ratio = {
            convention: flops.training_ratio(
                config, self.length, convention, expected_loops=self.expected_loops
            )
            for convention in flops.CONVENTIONS
        }
        return {
            "arm": self.name,
            "seed": self.seed,
            "layers": config.num_layers,
            "looped": f"{config.loop_start}:{config.loop_end}" if config.max_loops > 1 else "",
            "max_loops": config.max_loops,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.steps,
            "sequences": self.steps * batch,
            **{f"training FLOPs, {convention}": total for convention, total in self.flops.items()},
            **{f"step cost over no loop, {convention}": value for convention, value in ratio.items()},
            "cpu_seconds": self.cpu_seconds,
        }


def train_arm(
    base: RunFile,
    arm: Arm,
    budget: Budget,
    seed: int,
    folder: Path,
    threads: int = 1,
    device: torch.device | str = "cpu",
) -> TrainedArm:
    """Train an arm in `folder`, or continue it, or only load it where it is done.

    Args:
        base: the run of the study; the arm's fields and the seed replace its own, the budget its steps.

    Raises:
        ValueError: `folder` holds another run.
        UsageError: the budget is below one step.
    """
    plain = arm.model.get("max_loops", base.model.get("max_loops")) == 1
    training = base.training | {"seed": seed, "eval_every": 0} | ({"loop_law": "uniform"} if plain else {})
    asked = dataclasses.replace(base, model=base.model | arm.model, training=training)
    with RunFolder(folder, FILES) as held:
        return _train_held(asked, arm, budget, seed, held, threads, device)


def _train_held(
    asked: RunFile,
    arm: Arm,
    budget: Budget,
    seed: int,
    held: RunFolder,
    threads: int,
    device: torch.device | str,
) -> TrainedArm:
    folder = held.path
    stored = RunFile.read(folder)
    if stored is None:
        refuse_files(folder, replaced_by(asked, folder), "a new arm")
    with torch.inference_mode(False):  # its tensors are trained
        job = make_job(asked, folder, threads, begun=stored is not None)
    config, length = job.config, job.run.length or job.model.config.max_length
    law = LoopLaw.parse(config.loop_law, job.model.config.max_loops, dims=job.model.config, length=length)
    batch = config.batch_size * config.accumulation
    with usage_errors("--flops"):
        steps = steps_within(budget, job.model.config, length, batch, law, seed)
    config = dataclasses.replace(config, steps=steps, checkpoint_minutes=1.0)
    run = dataclasses.replace(job.run, training=config.to_dict())
    if stored is not None:
        before, after = _weights_depend_on(stored), _weights_depend_on(run)
        if before != after:
            differing = ", ".join(name for name in after if before[name] != after[name])
            raise ValueError(f"{folder} holds another run ({differing} differ): choose another folder")
    job._replace(run=run).write(folder)
    with torch.inference_mode(False), torch.enable_grad():
        trainer = Trainer(job.model.to(device), job.data, config, held)
        counters = trainer.counters if trainer.resume() == steps else trainer.train()
    executed = {
        convention: float(
            sum(
                batch * flops.training_flops(job.model.config, length, law.sample(seed, step), convention)
                for step in range(steps)
            )
        )
        for convention in flops.CONVENTIONS
    }
    return TrainedArm(
        arm.name,
        seed,
        LoopMDM.from_pretrained(folder).to(device).eval(),
        run,
        steps,
        length,
        law.mean,
        executed,
        counters.cpu_seconds,
    )


def _weights_depend_on(run: RunFile) -> dict[str, Any]:
    """The fields of a run without those that change no weight."""
    training = {name: value for name, value in run.training.items() if name not in _CADENCE}
    return dataclasses.asdict(run) | {"training": training, "evaluation": {}}


def make_job(run: RunFile, folder: Path, threads: int, *, begun: bool) -> Job:
    """Model, data and configuration of a run; packed text is kept beside the folder."""
    if run.preset in SUDOKU_RECIPES:
        return sudoku_job(run, threads)
    if are_corpora(run.data):
        return corpus_job(run)
    corpus, tokenizer = text_tokenizer(run, folder, begun=begun)
    return text_job(run, corpus, tokenizer, folder.parent / "tokens")
