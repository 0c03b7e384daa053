"""What more loops cost a training step: time against S, and peak memory at S = 12 against S = 1.

python -m bench.probes.training_loops [part] [result]: the step of `bench/model.py` with our ops. Times are
medians of rounds in which every S has its turn, and the looped blocks alone too. Memory is that of a process
of its own for each case. `part` is "time", "memory" or "both"; `result` is a JSON file to write.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loopmdm_kernels as lk
from bench.looped_blocks import applied
from bench.model import token_ids, trained_config, training_step
from bench.roofline import NAMES, limits, native_dtype
from bench.run import gradients_of
from bench.script import arguments
from loopmdm.model import LoopMDM
from loopmdm.train.usage import peak_memory
from loopmdm_kernels.files import write_file
from loopmdm_kernels.testing import interleaved_medians, looped_inputs

BATCH, LENGTH, MOST = 4, 512, 12
LOOPS = (1, 2, 4, 6, 8, 10, 12)
ROUNDS, STEPS = 5, 3
# python -m bench.probes.training_loops --memory S KIND prints what `memory` measures.
_MEMORY = "--memory"
# Whether each loop is recomputed, and which loops have a loss.
KINDS = {
    "everything kept": (False, "last"),
    "recomputed": (True, "last"),
    "everything kept, a loss after every loop": (False, "mean"),
    "recomputed, a loss after every loop": (True, "mean"),
}


def step_of(model: LoopMDM) -> Callable[[int], None]:
    """Takes a training step with so many loops, in the dtype of the processor's fastest product."""
    ids, chosen = token_ids(BATCH, LENGTH, model.config), [1]

    def loss(model: LoopMDM) -> Any:
        return model.loss(ids, num_loops=chosen[0], seed=0).loss

    step = training_step(model, loss, native_dtype() == torch.bfloat16)

    def run(num_loops: int) -> None:
        chosen[0] = num_loops
        step()

    return run


def new_model() -> LoopMDM:
    torch.manual_seed(0)
    return LoopMDM(trained_config(LENGTH, MOST))


def blocks_alone(model: LoopMDM, num_loops: int) -> Callable[[], Any]:
    """The op on as many blocks as the model loops, forward and backward."""
    config = model.config
    inputs = looped_inputs(
        BATCH, LENGTH, config.hidden_size, config.num_heads, num_blocks=config.loop_end - config.loop_start
    ).to(torch.float32, requires_grad=True)
    result = partial(applied, lk.looped_blocks, inputs, num_loops, compute_dtype=native_dtype())
    call: Callable[[], Any] = gradients_of(result, list(inputs.leaves().values()))
    return call


def times() -> dict[str, Any]:
    """Milliseconds of a step by S, a line through them, and the time of the looped blocks alone."""
    model = new_model()
    step = step_of(model)
    calls: dict[Any, Callable[[], Any]] = {loops: partial(step, loops) for loops in LOOPS}
    calls["blocks once"], calls["blocks 12 times"] = blocks_alone(model, 1), blocks_alone(model, MOST)
    seconds = interleaved_medians(calls, repeats=ROUNDS, warmup=1)
    medians = {name: 1e3 * value for name, value in seconds.items()}
    steps = np.array([medians[loops] for loops in LOOPS])
    slope, start = np.polyfit(LOOPS, steps, 1)
    rest = steps - (start + slope * np.array(LOOPS))
    once = medians["blocks once"]
    a_loop = (medians["blocks 12 times"] - once) / (MOST - 1)
    return {
        "milliseconds": {str(name): round(value, 1) for name, value in medians.items()},
        "slope_milliseconds": round(float(slope), 2),
        "r_squared": round(1 - float((rest**2).sum() / ((steps - steps.mean()) ** 2).sum()), 5),
        "slope_over_blocks_once": round(float(slope) / once, 3),
        "slope_over_a_loop_of_the_blocks": round(float(slope) / a_loop, 3),
    }


def memory(num_loops: int, kind: str) -> dict[str, float]:
    """MiB that this process held before there was a model, and at most in some steps."""
    before = peak_memory(torch.device("cpu"))
    model = new_model()
    model.recompute, model.loop_loss = KINDS[kind]
    step = step_of(model)
    for _ in range(STEPS):
        step(num_loops)
    return {"before": before / 2**20, "peak": peak_memory(torch.device("cpu")) / 2**20}


def peaks() -> dict[str, Any]:
    """Of processes that take steps with one S each; the ratio leaves out what they held before."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        held = {}
        for loops in (1, MOST):
            command = [sys.executable, "-m", "bench.probes.training_loops", _MEMORY, str(loops), kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured = json.loads(done.stdout)
            held[loops] = measured["peak"] - measured["before"]
        figures[kind] = {
            **{f"mebibytes_S{loops}": round(value, 1) for loops, value in held.items()},
            "ratio": round(held[MOST] / held[1], 3),
        }
    return figures


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"time": times, "memory": peaks}


def measure(part: str) -> dict[str, Any]:
    machine, native = limits(), NAMES[native_dtype()]
    return {
        "command": f"python -m bench.probes.training_loops {part}",
        "dtype": native,
        "machine": {name: machine[name] for name in ("isa", "threads", f"peak_{native}")},
        "versions": {"loopmdm_kernels": lk.__version__, "torch": torch.__version__},
        "figures": {name: figures() for name, figures in PARTS.items() if part in (name, "both")},
    }


def main(part: str = "both", target: str | None = None) -> None:
    if part not in (*PARTS, "both"):
        raise SystemExit(f"part: got {part}, expected one of {', '.join(PARTS)}, both")
    result = measure(part)
    if target is not None:
        write_file(Path(target), json.dumps(result, indent=1) + "\n")
    for name, figures in result["figures"].items():
        print(name)
        for key, value in figures.items():
            print(f"  {key}: {value}")


if __name__ == "__main__":
    if sys.argv[1:2] == [_MEMORY]:
        print(json.dumps(memory(int(sys.argv[2]), sys.argv[3])))
    else:
        main(*arguments(__doc__, "[part]", "[result]"))
