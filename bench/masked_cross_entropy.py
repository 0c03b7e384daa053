"""masked_cross_entropy, forward and backward, beside plain PyTorch; its peak memory in a fresh process.

python -m bench.masked_cross_entropy bf16|fp32 prints JSON: the bytes of the weight, and by how much the
resident memory rose at its highest. Linux only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench import peers, script
from bench.roofline import native_dtype
from bench.run import DTYPES, REAL, Calls, Run, gradients_of
from loopmdm_kernels.types import Head

LENGTH, NUM_ROWS, HIDDEN, VOCAB = 1024, 512, REAL.hidden, REAL.vocab_size


class Inputs(NamedTuple):
    hidden: Tensor
    head: Head
    targets: Tensor
    rows: Tensor
    row_weights: Tensor


def inputs(dtype: torch.dtype, vocab_size: int = VOCAB) -> Inputs:
    """Made in their own dtype, so that making them needs no more memory than they take."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=kind).mul_(scale).requires_grad_()

    head = Head(
        norm=normal(HIDDEN, scale=1.0),
        weight=normal(vocab_size, HIDDEN, scale=HIDDEN**-0.5),
        bias=normal(vocab_size, scale=0.1),
        modulation=normal(1, 2, HIDDEN, scale=0.3),
        excluded_token=vocab_size - 1,
    )
    return Inputs(
        hidden=normal(1, LENGTH, HIDDEN, scale=1.0, kind=torch.float32),
        head=head,
        targets=torch.randint(vocab_size - 1, (1, LENGTH), generator=generator),
        rows=torch.arange(0, LENGTH, LENGTH // NUM_ROWS),
        row_weights=torch.ones(NUM_ROWS),
    )


def loss_and_gradients(arguments, function=lk.masked_cross_entropy, compute_dtype=torch.bfloat16):
    leaves = [arguments.hidden, *arguments.head[:4]]

    def run():
        total, _ = function(*arguments, compute_dtype=compute_dtype)
        return torch.autograd.grad(total, leaves)

    return run


def gpu_calls(run: Run) -> Calls:
    """With every gradient, for every second row; implementations that cannot choose take all rows."""
    hidden, head = run.head(*run.sizes.training, grad=True)
    targets, *chosen = run.rows(*run.sizes.training)
    every_row = torch.arange(targets.numel(), device=run.device)
    every = (every_row, torch.ones(every_row.shape[0], device=run.device))
    plain = run.compiled(peers.masked_cross_entropy)

    def loss(function, rows, weights):
        return function(hidden, head, targets, rows, weights)[0]

    losses = {
        "ours": partial(loss, lk.masked_cross_entropy, *chosen),
        "compiled": partial(loss, plain, *chosen),
        "compiled, all rows": partial(loss, plain, *every),
    }
    calls = {name: gradients_of(call, [hidden, *head[:4]]) for name, call in losses.items()}
    for name, call in peers.linear_losses(hidden, head, targets, chosen[0]).items():
        calls[name] = gradients_of(call, [hidden, head.weight, head.bias])
    liger = peers.liger_loss(hidden, head, targets)
    if liger is not None:
        calls["Liger, all rows"] = gradients_of(liger, [hidden, head.weight])
    return calls


def resident_bytes(field: str) -> int:
    """VmRSS: now; VmHWM: at its highest."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status: no line {field}")
    return 1024 * int(match[1])


def memory_of_this_process(dtype: torch.dtype) -> dict[str, int]:
    loss_and_gradients(inputs(dtype, vocab_size=100))()  # libraries and threads are there now
    arguments = inputs(dtype)
    run = loss_and_gradients(arguments)
    before = resident_bytes("VmRSS")
    gradients = run()
    rise = resident_bytes("VmHWM") - before
    weight = arguments.head.weight
    assert any(gradient.shape == weight.shape for gradient in gradients)
    return {"weight_bytes": weight.numel() * weight.element_size(), "rise_bytes": rise}


def peak_memory(name: str) -> float:
    """Of the weight, and of what is allocated beside it, over the weight and its gradient."""
    command = [sys.executable, "-m", "bench.masked_cross_entropy", name]
    root = Path(__file__).resolve().parents[1]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    measured = json.loads(output)
    return (measured["weight_bytes"] + measured["rise_bytes"]) / (2 * measured["weight_bytes"])


@pytest.mark.parametrize("name", DTYPES, ids=[f"{name}-parameters" for name in DTYPES])
def test_masked_cross_entropy(compare, name):
    dtype, variants = DTYPES[name], {}
    for kind, compute_dtype in DTYPES.items():
        # Where the parameters are bf16, the fp32 peer has its own in fp32.
        arguments = inputs(torch.promote_types(dtype, compute_dtype))
        plain = peers.masked_cross_entropy
        variants[f"eager {kind}"] = loss_and_gradients(arguments, plain, compute_dtype)
        variants[f"compiled {kind}"] = loss_and_gradients(arguments, peers.compiled(plain), compute_dtype)
        hidden, head, *chosen = arguments[:4]
        if head.weight.dtype == compute_dtype:
            for way, loss in peers.linear_losses(hidden, head, *chosen).items():
                variants[f"{way} {kind}"] = gradients_of(loss, [hidden, head.weight, head.bias])
    fastest = native_dtype() if dtype == torch.float32 else dtype
    memory = {"memory": round(peak_memory(name), 3)} if sys.platform == "linux" else {}
    compare(
        loss_and_gradients(inputs(dtype), compute_dtype=fastest),
        variants,
        flops=3 * 2.0 * NUM_ROWS * HIDDEN * VOCAB,
        dtype=fastest,
        **memory,
    )


if __name__ == "__main__":
    print(json.dumps(memory_of_this_process(*(DTYPES[name] for name in script.arguments(__doc__, "dtype")))))
