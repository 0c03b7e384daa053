"""Small runs of the engine, alone or as a rank: python engine_runs.py FOLDER JOB..., a job in JSON.

A step has four micro-batches, whoever computes them; what they hold follows from their numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data.batches import Batch
from loopmdm.train import TrainConfig, Trainer
from loopmdm.train.parallel import full

MICRO_BATCHES, STEPS, HALF = 4, 20, 10


def new_model() -> LoopMDM:
    config = LoopMDMConfig(
        vocab_size=20,
        mask_token_id=19,
        hidden_size=16,
        num_heads=2,
        num_layers=3,
        cond_dim=6,  # which four ranks cannot share evenly
        max_length=8,
        loop_start=1,
        loop_end=2,
        max_loops=4,
        mlp_ratio=2,
        dropout=0.1,
    )
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # rank 0 has the weights of all
    model = LoopMDM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(step: int, micro_step: int, rank: int, world_size: int, batch_size: int) -> Batch:
    number = step * MICRO_BATCHES + micro_step * world_size + rank
    return Batch(torch.randint(19, (batch_size, 8), generator=torch.Generator().manual_seed(number)))


def trainer(folder: Path, model: LoopMDM, options: dict[str, Any], **changes: Any) -> Trainer:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    values = {"steps": STEPS, "batch_size": 2, "accumulation": MICRO_BATCHES // world_size, "seed": 3}
    values |= {"learning_rate": 1e-3, "warmup_steps": 5, "checkpoint_every": HALF, "log_every": 1}
    return Trainer(model, batches, TrainConfig(**values | changes), folder, show_progress=False, **options)


def run(folder: Path, options: dict[str, Any], **changes: Any) -> Trainer:
    """A run from its start."""
    built = trainer(folder, new_model(), options, **changes)
    built.train()
    return built


def resume(folder: Path, options: dict[str, Any], **changes: Any) -> Trainer:
    """A run from where it stands in its folder."""
    built = trainer(folder, new_model(), options, **changes)
    assert built.resume() == HALF
    built.train()
    return built


def half(folder: Path, name: str) -> Path:
    """A folder with what a finished run had at its half."""
    made = folder.parent / name
    if folder.joinpath("checkpoints").exists():
        step = f"checkpoints/step-{HALF:08d}"
        shutil.copytree(folder / step, made / step)
    else:
        made.mkdir()
        shutil.copy(folder / "half.safetensors", made / "training_state.safetensors")
    shutil.copy(folder / "train_config.json", made)
    return made


def weights(built: Trainer) -> dict[str, Tensor]:
    return {name: full(value.detach()).clone() for name, value in built.model.named_parameters()}


class Counting(TorchDispatchMode):
    count = 0  # gradients added up and split over the ranks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.c10d._reduce_scatter_base_.default
        return function(*args, **(kwargs or {}))


def traffic(folder: Path, options: dict[str, Any]) -> int:
    """How often gradients travel in a step of two micro-batches."""
    built = trainer(folder, new_model(), options, steps=1, accumulation=2)
    if options["parallel"] == "ddp":
        count = 0

        def counting(group, bucket):  # the hook's annotations may not be strings
            nonlocal count
            count += 1
            return allreduce_hook(group, bucket)

        built.ranks._loss.register_comm_hook(dist.group.WORLD, counting)
        built.train()
        return count
    with Counting() as counting:
        built.train()
    return counting.count


def main(folder: Path, jobs: list[dict[str, Any]]) -> None:
    dist.init_process_group("gloo")
    for job in jobs:
        name, source = job.pop("name"), job.pop("resumes", None)
        if name.startswith("traffic"):
            print(name, traffic(folder / name, job), flush=True)
            continue
        accumulation = job.pop("accumulation", None)
        changes = {} if accumulation is None else {"accumulation": accumulation}
        if source is None:
            built = run(folder / name, job, **changes)
        else:
            if dist.get_rank() == 0:
                half(folder / source, name)
            dist.barrier()
            built = resume(folder / name, job, **changes)
        result = weights(built)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [json.loads(job) for job in sys.argv[2:]])
