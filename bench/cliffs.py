"""Looks for shapes at which the CPU kernels are slower than plain PyTorch: short sequences, few rows, draws.

python -m bench.cliffs --output bench/results/DATE-cpu-cliffs.json

Each case runs on the `cpu` and the `reference` backend in turn, restricted draws beside sort and multinomial
too. Figures are medians, of processor time on one thread and of wall time on more; a ratio below 1, marked
with <, is a shape at which plain PyTorch is faster. Other work on the machine only ever makes such figures by
chance, so these cases are timed once more, five times as long, and the second figures count. `--only TEXT`
runs the cases whose names contain it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk
from bench.looped_blocks import applied
from bench.run import DTYPES
from loopmdm_kernels.files import write_file
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head

WIDTHS = {64: 4, 256: 8, 768: 12}  # D: H
SHAPES = (  # B, L
    *((1, 1), (32, 1), (64, 1), (1, 4), (8, 4), (32, 4), (1, 8), (32, 8), (8, 12), (4, 16), (64, 16)),
    *((4, 24), (8, 33), (16, 48), (1, 64), (8, 64)),
)
ROWS = (1, 2, 4, 8, 16, 256)
VOCABULARIES = (35, 300, 8192, 50258)
MOST_LOGITS = 5_000_000  # of a case; beyond, it has FEWER rows
FEWER = 64
AGAIN = 5  # how much longer the second time is
RESTRICTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 8},
    {"top_k": 20_000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.99},
)
Variants = dict[str, Callable[[], Any]]


def medians(variants: Variants, seconds: float) -> dict[str, float]:
    """Median seconds, the variants in turn. Of processor time where no thread spins for another."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, run in variants.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def on_backends(call: Callable[[], Any], *, grad: bool = False) -> Variants:
    def run(backend: str) -> None:
        with lk.use_backend(backend), torch.set_grad_enabled(grad):
            call()

    return {"cpu": lambda: run("cpu"), "reference": lambda: run("reference")}


def looped_cases(dtype: torch.dtype) -> Iterator[tuple[str, Variants]]:
    for (hidden, heads), (batch, length) in itertools.product(WIDTHS.items(), SHAPES):
        inputs = looped_inputs(batch, length, hidden, heads, 1).to(dtype)
        blocks = [type(block)(*(w.requires_grad_() for w in block)) for block in inputs.blocks]

        forward = partial(applied, lk.looped_blocks, inputs._replace(blocks=blocks), 2)

        def step(forward: Any = forward, blocks: Any = blocks) -> None:
            torch.autograd.grad(forward().square().sum(), blocks[0])

        yield f"looped_blocks D{hidden} B{batch} L{length}", on_backends(forward)
        yield f"looped_blocks step D{hidden} B{batch} L{length}", on_backends(step, grad=True)
        heads_of = torch.randn(3, batch, length, heads, hidden // heads).to(dtype).transpose(2, 3).unbind()
        leaves = [x.detach().clone().requires_grad_() for x in heads_of]
        yield f"attention D{hidden} B{batch} L{length}", on_backends(lambda x=heads_of: lk.attention(*x))
        yield (
            f"attention step D{hidden} B{batch} L{length}",
            on_backends(lambda x=leaves: torch.autograd.grad(lk.attention(*x).sum(), x), grad=True),
        )


@torch.no_grad()
def sort_and_multinomial(
    hidden: torch.Tensor, head: Head, rows: torch.Tensor, top_k: int | None = None, top_p: float = 1.0
) -> torch.Tensor:
    with lk.use_backend("cpu"):
        logits = lk.head_logits(hidden, head)[0, rows].float()
    values, index = logits.sort(descending=True)
    probs = values[:, :top_k].softmax(-1)
    if top_p < 1:
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    return index.gather(1, torch.multinomial(probs, 1))


def draws(hidden: torch.Tensor, head: Head, rows: torch.Tensor) -> Iterator[tuple[str, Variants]]:
    rng = row_rng(len(rows))
    for options in RESTRICTIONS:
        name = " ".join(("sample_rows", *(f"{key}={value}" for key, value in options.items())))
        variants = on_backends(lambda o=options: lk.sample_rows(hidden, head, rows, rng, **o))
        if options:
            variants["sort"] = lambda o=options: sort_and_multinomial(hidden, head, rows, **o)
        yield name, variants


def head_cases(dtype: torch.dtype) -> Iterator[tuple[str, Variants]]:
    for vocab_size, num_rows in itertools.product(VOCABULARIES, ROWS):
        if num_rows * vocab_size > MOST_LOGITS:
            num_rows = FEWER
        hidden, exact = head_inputs(1, num_rows, 128, vocab_size, spread=0.3, excluded_token=vocab_size - 1)
        head = Head(*(tensor.to(dtype) for tensor in exact[:4]), vocab_size - 1)
        hidden, rows = hidden.float(), torch.arange(num_rows)
        targets = (rows % (vocab_size - 1))[None]

        calls = {
            "head_logits": partial(lk.head_logits, hidden, head),
            "masked_cross_entropy": lambda h=hidden, w=head, t=targets: lk.masked_cross_entropy(h, w, t)[0],
        }
        size = f"V{vocab_size} R{num_rows}"
        for name, variants in draws(hidden, head, rows):
            yield f"{name} {size}", variants
        for name, call in calls.items():
            yield f"{name} {size}", on_backends(call)
        head.weight.requires_grad_()
        for name, call in calls.items():
            step = partial(weight_gradient, call, head.weight)
            yield f"{name} step {size}", on_backends(step, grad=True)


def weight_gradient(call: Callable[[], torch.Tensor], weight: torch.Tensor) -> Any:
    out = call()
    return torch.autograd.grad(out.sum() if out.ndim else out, weight)


def sweep(threads: list[int], dtypes: list[str], seconds: float, only: str = "") -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for number, dtype in itertools.product(threads, dtypes):
        torch.set_num_threads(number)
        for name, variants in itertools.chain(looped_cases(DTYPES[dtype]), head_cases(DTYPES[dtype])):
            if only not in name:
                continue
            times = medians(variants, seconds)
            if times["reference"] < times["cpu"]:
                times = medians(variants, AGAIN * seconds)
            ratios = {peer: round(times[peer] / times["cpu"], 3) for peer in times if peer != "cpu"}
            label = f"{name} {dtype} threads {number}"
            figures[label] = {"cpu_ms": round(1e3 * times["cpu"], 4), **ratios}
            print(
                f"{'<' if ratios['reference'] < 1 else ' '} {label:70} {1e3 * times['cpu']:9.3f} ms {ratios}",
                flush=True,
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names contain it")
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on a case, about (default: 0.2)")
    options = parser.parse_args()
    torch.manual_seed(0)
    figures = sweep(options.threads, options.dtypes, options.seconds, options.only)
    slower = sorted(name for name, figure in figures.items() if figure["reference"] < 1)
    print(f"{len(slower)} of {len(figures)} cases are slower than the reference backend")
    if options.output:
        result = {
            "command": "python -m bench.cliffs " + " ".join(sys.argv[1:]),
            "torch": torch.__version__,
            "backends": lk.available_backends(),
            "slower": slower,
            "figures": figures,
        }
        write_file(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
