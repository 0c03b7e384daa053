"""See the package at work, in about two minutes on two processor cores.

Solves held-out Sudoku puzzles with the shipped models at several loop counts, trains a small model for a few
steps, and times the CPU kernel that draws tokens against plain PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

import loopmdm_kernels as lk
from loopmdm.cli.output import has_color, print_json, print_table
from loopmdm.cli.parser import add_json
from loopmdm.data.sudoku import SudokuSpec, format_board, is_valid_solution
from loopmdm.data.sudoku.boards import Cells
from loopmdm.model import LoopMDM
from loopmdm.runs.boards import ORDERS, SHARE_COLUMNS, greedy, held_out_puzzles, share_row, solve_all
from loopmdm.runs.models import SHIPPED, default_loops, load_model
from loopmdm.runs.options import thread_count
from loopmdm.runs.recipes import SUDOKU_RECIPES
from loopmdm.sampling import StepEvent
from loopmdm.sampling.sampler import sample_with
from loopmdm.solve import to_fill
from loopmdm.terminal import note
from loopmdm.train import Trainer
from loopmdm_kernels.types import Head, RowRng

EPILOG = """example:
  loopmdm demo
"""
_PUZZLES = {"sudoku9": 12, "sudoku6": 40}
_TRAINING_STEPS, _STEPS_A_LINE = 160, 40
# Rows, hidden size and vocabulary of the race: LoopMDM at its published size.
_SPEED_SHAPE = {"rows": 64, "hidden_size": 768, "vocab_size": 50258}
_REPEATS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser, "all figures")
    parser.add_argument("--threads", type=thread_count, help="processor threads (default: those of torch)")


def run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    say = _Speech(silent=args.json)
    document: dict[str, Any] = {
        "sudoku": [_solve(name, spec, say) for name, spec in SHIPPED.items()],
        "training": _train(say),
        "speed": _race(say),
    }
    document["seconds"] = time.perf_counter() - start
    if args.json:
        print_json(document)
    say.line(f"\nDone in {document['seconds']:.0f} s. Next: loopmdm train --data YOUR_TEXT --out run")
    return 0


class _Speech:
    """Prints, unless the only thing to print is a JSON document."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent

    def heading(self, text: str) -> None:
        if self.silent:
            note(text)
        else:
            print(f"\n\033[1m{text}\033[0m" if has_color() else f"\n{text}\n{'=' * len(text)}", flush=True)

    def line(self, text: str = "") -> None:
        if not self.silent:
            print(text, flush=True)


def _solve(name: str, spec: SudokuSpec, say: _Speech) -> dict[str, Any]:
    say.heading(f"Solving {spec} Sudoku with the shipped model {name}")
    model = load_model(name, torch.device("cpu"))
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    looped = f"{config.loop_start} to {config.loop_end - 1}"
    say.line(
        f"{parameters:,} parameters, {config.num_layers} blocks; blocks {looped} are applied S times, S up to"
        f" {config.max_loops} in training. The puzzles are held out."
    )
    puzzles = held_out_puzzles(spec, _PUZZLES[name]).clues
    if not say.silent:
        _show_solving(model, spec, puzzles[0])
    solved = [
        one.to_dict()
        for one in solve_all(model, spec, puzzles, greedy(ORDERS, default_loops(model)), progress=True)
    ]
    if not say.silent:
        print(f"Share of {len(puzzles)} held-out puzzles solved:\n")
        print_table(SHARE_COLUMNS, [share_row(one) for one in solved])
    return {
        "model": name,
        "size": str(spec),
        "parameters": parameters,
        "puzzles": len(puzzles),
        "solved": solved,
    }


def _show_solving(model: LoopMDM, spec: SudokuSpec, clues: Cells) -> None:
    """One puzzle solved in three ways side by side; on a terminal, cell by cell."""
    most = model.config.max_loops
    ways = [*greedy(["left_to_right"], [1, most]), *greedy(["confidence"], [most])]
    boards = [clues.copy() for _ in ways]
    board_width = 2 * spec.size + 2 * spec.box_rows + 1
    titles = [f"{way.order.replace('_', ' ')}, S = {way.plan.parts[0].compute.num_loops}" for way in ways]

    def picture() -> str:
        drawn = [format_board(spec, b, clues=clues, color=has_color()).splitlines() for b in boards]
        verdicts = [
            "" if not b.all() else "solved" if is_valid_solution(spec, b) else "wrong" for b in boards
        ]
        # Colour codes take no room, so boards cannot be padded by their length.
        space = " " * max(0, max(map(len, titles)) - board_width)
        width = board_width + len(space)
        rows = [[line + space for line in row] for row in zip(*drawn, strict=True)]
        captions = [[text.ljust(width) for text in row] for row in (titles, verdicts)]
        return "\n".join("   ".join(row).rstrip() for row in (captions[0], *rows, captions[1]))

    tokens = to_fill(spec, clues)[None]
    with _drawing() as draw:
        for board, way in zip(boards, ways, strict=True):

            def fill(event: StepEvent, board: Cells = board) -> None:
                board[event.positions.numpy()] = (event.tokens + 1).numpy()
                draw(picture())

            sample_with(model, way, infill=tokens, on_step=fill, progress=False)
    print(f"\n{picture()}\n")


@contextmanager
def _drawing() -> Iterator[Callable[[str], None]]:
    """Yields a function that redraws a picture in place; without a terminal it does nothing."""
    if not sys.stdout.isatty():
        yield lambda picture: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), transient=True, refresh_per_second=20) as live:
        yield lambda picture: live.update(Text.from_ansi(picture))


def _train(say: _Speech) -> dict[str, Any]:
    say.heading(f"Training a 6x6 model from scratch, {_TRAINING_STEPS} steps")
    losses: list[float] = []
    averages: list[float] = []

    def on_log(record: dict[str, Any]) -> None:
        losses.append(record["loss"])
        if len(losses) % _STEPS_A_LINE == 0:
            averages.append(statistics.fmean(losses[-_STEPS_A_LINE:]))
            first = len(losses) - _STEPS_A_LINE + 1
            say.line(f"steps {first:3d} to {len(losses):3d}: loss {averages[-1]:.3f} nats per cell")

    options: dict[str, Any] = {
        "steps": _TRAINING_STEPS,
        "warmup_steps": 10,
        "learning_rate": 2e-3,
        "schedule": "constant",
        "batch_size": 64,
        "log_every": 1,
    }
    # Full grids need no pool of puzzles, so the first step comes at once.
    recipe = dataclasses.replace(SUDOKU_RECIPES["sudoku6"], clues="full")
    model, data, config = recipe.build("sudoku6", **options)
    with tempfile.TemporaryDirectory() as folder:
        counters = Trainer(model, data, config, folder, on_log, show_progress=False).train()
    say.line(
        f"{counters.tokens / counters.seconds:,.0f} cells/s. `loopmdm train --preset sudoku6` does it all."
    )
    return {"steps": counters.step, "losses": losses, "average_losses": averages, "seconds": counters.seconds}


def _race(say: _Speech) -> dict[str, Any]:
    """Time of drawing the same rows by the CPU kernel and by the reference algorithm in PyTorch."""
    num, hidden_size, vocab_size = _SPEED_SHAPE.values()
    say.heading("Drawing tokens: the fused CPU kernel against plain PyTorch")
    generator = torch.Generator().manual_seed(0)
    head = Head(
        torch.ones(hidden_size),
        torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5,
        torch.zeros(vocab_size),
        torch.zeros(1, 2, hidden_size),
        vocab_size - 1,
    )
    hidden = torch.randn(1, num, hidden_size, generator=generator)
    rows = torch.arange(num)
    rng = RowRng(0, torch.zeros_like(rows), torch.zeros_like(rows), rows)

    def fused() -> None:
        with lk.use_backend("cpu"):
            lk.sample_rows(hidden, head, rows, rng)

    def plain() -> None:
        _plain_draw(hidden[0], head)

    times: dict[str, list[float]] = {"fused": [], "plain": []}
    for repeat in range(_REPEATS + 1):
        for name, draw in (("fused", fused), ("plain", plain)):
            start = time.perf_counter()
            draw()
            if repeat:  # the first of each is a warm-up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["plain"] / medians["fused"]
    threads = torch.get_num_threads()
    say.line(
        f"{num} rows, hidden size {hidden_size}, vocabulary {vocab_size}, fp32, {threads} threads,"
        f" medians of {_REPEATS} interleaved runs:\n"
        f"  PyTorch (logits, softmax, fp64 race)  {1000 * medians['plain']:7.1f} ms\n"
        f"  loopmdm sample_rows, {lk.available_backends()['cpu']:<17} {1000 * medians['fused']:7.1f} ms\n"
        f"  ratio {ratio:.2f}"
    )
    return {
        **_SPEED_SHAPE,
        "threads": threads,
        "instruction_set": lk.available_backends()["cpu"],
        "plain_seconds": medians["plain"],
        "fused_seconds": medians["fused"],
        "ratio": ratio,
    }


def _plain_draw(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Tokens [R] for hidden [R, D] as the reference draws them: all logits, softmax, an fp64 race."""
    norm, _, _, modulation = head.tensors
    shift, scale = modulation[0]
    normed = F.layer_norm(hidden, hidden.shape[-1:]) * norm * (1 + scale) + shift
    logits = F.linear(normed, head.weight, head.bias)
    logits[:, head.excluded_token] = -torch.inf
    probs = logits.softmax(-1).double()
    race = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
    return (probs / race).argmax(-1)
