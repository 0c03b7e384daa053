"""Where the time of a training step goes, and how near to the peak of the instructions its parts come.

python -m bench.probes.training_step [result]: the step of `bench/model.py` with our ops, medians of some
steps. Then what the trainer does between two passes, and the bytes of weights that it moves.
`result` is a JSON file to write.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import loopmdm_kernels as lk
from bench.model import token_ids, trained_config, training_step
from bench.roofline import NAMES, limits, native_dtype
from bench.script import arguments
from loopmdm.model import LoopMDM
from loopmdm.model.flops import executed_layers, head_flops, layer_matmuls
from loopmdm.train.config import TrainConfig
from loopmdm.train.ema import EMA
from loopmdm.train.optimizers import Optimizer
from loopmdm.train.step import clip
from loopmdm_kernels import _C
from loopmdm_kernels.files import write_file

BATCH, LENGTH, LOOPS, STEPS = 4, 512, 6, 9
MACHINE = ("isa", "threads", "read_bandwidth")
# What the backward pass of the blocks does in each application, one after the other.
PHASES = ("MLP and attn_out", "attention", "qkv", "weights")
CALLS = {
    "looped_blocks": "blocks, forward",
    "masked_cross_entropy": "loss, forward",
    "masked_cross_entropy_backward": "loss, backward",
    "pack_linear": "packing weights",
    "fingerprint": "looking for changed weights",
}


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Inside, calls of the kernels and steps of AdamW add to `seconds` how long they take."""

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            out = function(*args, **options)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return out

        return run

    def backward(*args: Any) -> None:
        nanoseconds = torch.zeros(len(PHASES), dtype=torch.int64)
        start = time.perf_counter()
        blocks_backward(*args, nanoseconds=nanoseconds)
        total = time.perf_counter() - start
        for phase, value in zip(PHASES, nanoseconds.tolist(), strict=True):
            name = f"blocks, backward: {phase}"
            seconds[name] = seconds.get(name, 0.0) + value / 1e9
        rest = "blocks, backward: the rest"
        seconds[rest] = seconds.get(rest, 0.0) + total - float(nanoseconds.sum()) / 1e9

    blocks_backward = _C.looped_blocks_backward
    with ExitStack() as stack:
        for name, part in CALLS.items():
            stack.enter_context(mock.patch.object(_C, name, around(part, getattr(_C, name))))
        stack.enter_context(mock.patch.object(_C, "looped_blocks_backward", backward))
        step = around("AdamW", torch.optim.AdamW.step)
        stack.enter_context(mock.patch.object(torch.optim.AdamW, "step", step))
        yield


def flops(model: LoopMDM, rows: int) -> dict[str, float]:
    """Of the parts that are products; what is computed again is not counted."""
    matmuls = layer_matmuls(model.config, LENGTH)
    tokens = BATCH * LENGTH * executed_layers(model.config, LOOPS)
    attention = matmuls["attention_scores"] + matmuls["attention_values"]
    linear = sum(matmuls.values()) - attention
    head = rows * head_flops(model.config)
    return {
        "blocks, forward": tokens * (linear + attention),
        "blocks, backward: MLP and attn_out": tokens * (linear - matmuls["qkv"]),
        "blocks, backward: attention": tokens * 2 * attention,
        "blocks, backward: qkv": tokens * matmuls["qkv"],
        "blocks, backward: weights": tokens * linear,
        "loss, forward": head,
        "loss, backward": 2 * head,
    }


def updates(model: LoopMDM, step_seconds: float) -> dict[str, Any]:
    """The trainer's passes over gradients, weights and their averages, each by itself."""
    config = TrainConfig(steps=1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    optimizer, ema = Optimizer(names, parameters, config, torch.device("cpu")), EMA(model, config.ema)
    gradients = [torch.randn_like(p) for p in parameters]
    # What each one reads and writes of every weight, in bytes.
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "trainer: norm of the gradients": (4, lambda: clip(parameters, None, wait=True)),
        "trainer: norm and scaling": (4 + 8, lambda: clip(parameters, 1e9, wait=False)),
        "trainer: AdamW": (16 + 12, lambda: optimizer.step(1e-4)),
        "trainer: EMA": (8 + 4, ema.update),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(STEPS + 2):
        for name, (_, call) in calls.items():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    weights, figures = sum(p.numel() for p in parameters), {}
    for name, (size, _) in calls.items():
        seconds = statistics.median(times[name][2:])
        figures[name] = {
            "milliseconds": round(1e3 * seconds, 2),
            "share_of_time": round(seconds / step_seconds, 4),
            "gigabytes_per_second": round(weights * size / seconds / 1e9, 1),
        }
    return figures


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    model = LoopMDM(trained_config(LENGTH, LOOPS))
    ids = token_ids(BATCH, LENGTH, model.config)
    native = native_dtype()

    def loss(model: LoopMDM) -> Any:
        return model.loss(ids, num_loops=LOOPS, seed=0).loss

    with mock.patch.object(lk, "masked_cross_entropy", wraps=lk.masked_cross_entropy) as spy:
        loss(model)
    rows = int(spy.call_args.args[3].sum())
    step = training_step(model, loss, native == torch.bfloat16)
    each: list[dict[str, float]] = []
    for _ in range(STEPS + 2):
        parts: dict[str, float] = {}
        start = time.perf_counter()
        with timed(parts):
            step()
        total = time.perf_counter() - start
        each.append({**parts, "Python and PyTorch": total - sum(parts.values()), "step": total})
    medians = {name: statistics.median(parts[name] for parts in each[2:]) for name in each[-1]}
    machine = limits()
    peak, counted = machine[f"peak_{NAMES[native]}"], flops(model, rows)
    counted["step"] = sum(counted.values())
    figures = {}
    for name, seconds in medians.items():
        figures[name] = {
            "milliseconds": round(1e3 * seconds, 2),
            "share_of_time": round(seconds / medians["step"], 3),
        }
        if name in counted:
            figures[name]["share_of_peak"] = round(counted[name] / seconds / peak, 3)
    return {
        "command": "python -m bench.probes.training_step",
        "dtype": NAMES[native],
        "machine": {
            name: machine[name] for name in ("isa", "threads", f"peak_{NAMES[native]}", "read_bandwidth")
        },
        "versions": {"loopmdm_kernels": lk.__version__, "torch": torch.__version__},
        "figures": figures,
        "updates": updates(model, medians["step"]),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'part':40} {'ms':>8} {'of time':>8} {'of peak':>8}"]
    for name, figures in {**result["figures"], **result["updates"]}.items():
        reached = f"{100 * figures['share_of_peak']:.0f} %" if "share_of_peak" in figures else ""
        if "gigabytes_per_second" in figures:
            reached = f"{figures['gigabytes_per_second']:.0f} GB/s"
        of_time = f"{100 * figures['share_of_time']:.1f} %"
        lines.append(f"{name:40} {figures['milliseconds']:8.1f} {of_time:>8} {reached:>8}".rstrip())
    return "\n".join(lines)


def main(target: str | None = None) -> None:
    result = measure()
    if target is not None:
        write_file(Path(target), json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main(*arguments(__doc__, "[result]"))
