"""Looks for shapes at which the CPU kernels are slower than plain PyTorch: short sequences, few rows, draws.

python -m bench.cliffs --output bench/results/DATE-cpu-cliffs.json

Each case runs on the `cpu` and the `reference` backend in turn, restricted draws beside sort and multinomial
too. Figures are medians of processor time; a ratio below 1, marked with <, is a shape at which plain PyTorch
is faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk
from loopmdm_kernels.files import write_file
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head

WIDTHS = {64: 4, 256: 8, 768: 12}  # D: H
SHAPES = ((1, 1), (64, 1), (8, 4), (32, 8), (4, 16), (64, 16), (16, 48), (1, 64), (8, 64))  # B, L
RESTRICTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 8},
    {"top_k": 20_000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.99},
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Variants = dict[str, Callable[[], Any]]


def medians(variants: Variants, seconds: float) -> dict[str, float]:
    """Median processor seconds, the variants in turn."""
    for run in variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, run in variants.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
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

        def forward(inputs: Any = inputs, blocks: Any = blocks) -> torch.Tensor:
            return lk.looped_blocks(
                inputs.x, blocks, inputs.modulation, 2, num_heads=inputs.num_heads, rotary=inputs.rotary
            )

        def step(forward: Any = forward, blocks: Any = blocks) -> None:
            torch.autograd.grad(forward().square().sum(), blocks[0])

        yield f"looped_blocks D{hidden} B{batch} L{length}", on_backends(forward)
        yield f"looped_blocks step D{hidden} B{batch} L{length}", on_backends(step, grad=True)
        q, k, v = torch.randn(3, batch, heads, length, hidden // heads).to(dtype).unbind()
        yield (
            f"attention D{hidden} B{batch} L{length}",
            on_backends(lambda q=q, k=k, v=v: lk.attention(q, k, v)),
        )


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


def head_cases(dtype: torch.dtype) -> Iterator[tuple[str, Variants]]:
    for vocab_size, num_rows in itertools.product((35, 300, 8192, 50258), (1, 16, 256)):
        if num_rows * vocab_size > 5_000_000:
            num_rows = 64
        hidden, exact = head_inputs(1, num_rows, 128, vocab_size, spread=0.3, excluded_token=vocab_size - 1)
        head = Head(*(tensor.to(dtype) for tensor in exact[:4]), vocab_size - 1)
        hidden, rows, rng = hidden.float(), torch.arange(num_rows), row_rng(num_rows)
        size = f"V{vocab_size} R{num_rows}"
        for options in RESTRICTIONS:
            name = " ".join(f"{key}={value}" for key, value in options.items())

            def draw(
                hidden: Any = hidden, head: Any = head, rows: Any = rows, rng: Any = rng, o: Any = options
            ) -> Any:
                return lk.sample_rows(hidden, head, rows, rng, **o)

            def plain(hidden: Any = hidden, head: Any = head, rows: Any = rows, o: Any = options) -> Any:
                with torch.no_grad():
                    return sort_and_multinomial(hidden, head, rows, **o)

            yield (
                f"sample_rows {size} {name}".rstrip(),
                on_backends(draw) | ({"sort": plain} if options else {}),
            )
        yield f"head_logits {size}", on_backends(lambda h=hidden, w=head: lk.head_logits(h, w))
        weight = head.weight.requires_grad_()
        targets, row_weights = torch.arange(num_rows) % (vocab_size - 1), torch.ones(num_rows)

        def loss(
            hidden: Any = hidden,
            head: Any = head,
            targets: Any = targets,
            rows: Any = rows,
            w: Any = row_weights,
        ) -> torch.Tensor:
            return lk.masked_cross_entropy(hidden, head, targets, rows, w)[0]

        yield f"masked_cross_entropy {size}", on_backends(loss)
        yield (
            f"masked_cross_entropy step {size}",
            on_backends(lambda loss=loss, weight=weight: torch.autograd.grad(loss(), weight), grad=True),
        )


def sweep(threads: list[int], dtypes: list[str], seconds: float) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for number, dtype in itertools.product(threads, dtypes):
        torch.set_num_threads(number)
        for name, variants in itertools.chain(looped_cases(DTYPES[dtype]), head_cases(DTYPES[dtype])):
            times = medians(variants, seconds)
            ratios = {peer: round(times[peer] / times["cpu"], 3) for peer in times if peer != "cpu"}
            label = f"{name} {dtype} threads {number}"
            figures[label] = {"cpu_ms": round(1e3 * times["cpu"], 4), **ratios}
            worst = min(ratios.values())
            print(f"{'<' if worst < 1 else ' '} {label:70} {1e3 * times['cpu']:9.3f} ms {ratios}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on a case, about (default: 0.2)")
    options = parser.parse_args()
    torch.manual_seed(0)
    figures = sweep(options.threads, options.dtypes, options.seconds)
    slower = sorted(name for name, figure in figures.items() if min(list(figure.values())[1:]) < 1)
    print(f"{len(slower)} of {len(figures)} cases are slower than plain PyTorch")
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
