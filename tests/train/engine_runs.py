"""Small runs of the engine, alone or as ranks: python engine_runs.py FOLDER '{"RANKS": {"NAME": OPTIONS}}'.

A step has four micro-batches, whoever computes them; what they hold follows from their numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data.batches import Batch
from loopmdm.runs.evaluation import Prompt, Sampler, TextEvaluation
from loopmdm.runs.text_data import Windows
from loopmdm.train import TrainConfig, Trainer
from loopmdm.train.parallel import full

MICRO_BATCHES, STEPS, HALF = 4, 20, 10


def new_model(**changes: Any) -> LoopMDM:
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
        **changes,
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


def evaluation() -> TextEvaluation:
    """Of five sequences, in batches of two, and samples with 1, 2 and 4 loops."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(19, (5, 8), generator=generator)
    tokenizer: Any = SimpleNamespace(decode=lambda row: " ".join(map(str, row)), eos_token_id=0)
    sampler = Sampler(tokenizer, [Prompt("3", [3])], 2, 8, ends=False)
    return TextEvaluation(Windows([Batch(part) for part in ids.split(2)], 1.0), sampler)


def trainer(folder: Path, model: LoopMDM, options: dict[str, Any], **changes: Any) -> Trainer:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    values = {"steps": STEPS, "batch_size": 2, "accumulation": MICRO_BATCHES // world_size, "seed": 3}
    values |= {"learning_rate": 1e-3, "warmup_steps": 5, "checkpoint_every": HALF, "log_every": 1}
    if options.get("evaluate") is True:
        options, values = options | {"evaluate": evaluation()}, values | {"eval_every": HALF}
    return Trainer(model, batches, TrainConfig(**values | changes), folder, show_progress=False, **options)


def run(folder: Path, options: dict[str, Any], **changes: Any) -> Trainer:
    """A run from its start."""
    made = {name: value for name, value in options.items() if name in LoopMDMConfig.__dataclass_fields__}
    others = {name: value for name, value in options.items() if name not in made}
    built = trainer(folder, new_model(**made), others, **changes)
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
    norms = 0  # added up

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it does inside is seen
        self.count += function is torch.ops.c10d._reduce_scatter_base_.default
        self.norms += function is torch.ops._c10d_functional.all_reduce.default
        return function(*args, **(kwargs or {}))


def traffic(folder: Path, options: dict[str, Any]) -> str:
    """How often gradients travel in a step of two micro-batches, and their norm if it is split."""
    built = trainer(folder, new_model(), options, steps=1, accumulation=2)
    if options["parallel"] == "ddp":
        count = 0

        def counting(group, bucket):  # the hook's annotations may not be strings
            nonlocal count
            count += 1
            return allreduce_hook(group, bucket)

        built.ranks._loss.register_comm_hook(dist.group.WORLD, counting)
        built.train()
        return str(count)
    with Counting() as counting:
        built.train()
    return f"{counting.count} {counting.norms}"


def say(*words: object) -> None:
    """A line of its own in what all ranks print: `print` writes word by word where nothing is buffered."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def work(folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """What one rank does."""
    dist.init_process_group("gloo")
    torch.compile = partial(torch.compile, backend="aot_eager")
    for name, job in jobs.items():
        if name.startswith("traffic"):
            say(name, traffic(folder / name, job))
            continue
        if name == "refused":
            try:
                trainer(folder / name, new_model(), {"parallel": job["parallel"]}, compile=job["compile"])
            except ValueError as error:
                say(name, error)
            continue
        changes = {key: value for key, value in job.items() if key in TrainConfig.__dataclass_fields__}
        options = {key: value for key, value in job.items() if key not in changes}
        source = options.pop("resumes", None)
        if source is None:
            built = run(folder / name, options, **changes)
        else:
            if dist.get_rank() == 0:
                half(folder / source, name)
            dist.barrier()
            built = resume(folder / name, options, **changes)
        result = weights(built)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.barrier()


def ranks_of(number: int, folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Processes forked from this one, which has imported everything and computed nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    children = []
    for rank in range(number):
        child = os.fork()
        if not child:
            os.environ["RANK"] = str(rank)
            status = 1
            try:
                work(folder, jobs)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    failed = False
    for _ in range(number):
        _, status = os.wait()
        if status and not failed:  # the others may wait for it for ever
            failed = True
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    for ranks, jobs in json.loads(sys.argv[2]).items():
        ranks_of(int(ranks), Path(sys.argv[1]), jobs)
