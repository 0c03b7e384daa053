"""What more loops bring and cost, within the range of training and beyond it.

LoopMDM, Fig. 2, Fig. 5 (gain per timestep) and Table 1. For a model and loop counts S:

  nll       NELBO per token, with intervals of its difference to S = S_max
  gain      G(t; S) = CE_t(1) - CE_t(S), nats per masked token in bins of t
  change    r_k = ||H(k) - H(k-1)|| / ||H(k)||, Frobenius norms over a sequence, and how it varies with t
  samples   text: perplexity under a scorer (--scorer) and entropy over steps x loops;
            Sudoku: puzzles solved, left to right and by confidence
  time      t(S) = a + b S on the clock, b beside the time of the looped layers alone

One forward pass of the most loops gives the first three for every S. Intervals are 95 % percentile bootstraps
over sequences, samples or boards.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.model import LoopMDM, vocabulary
from loopmdm.quality import CausalScorer, load_scorer
from loopmdm.quality.bootstrap import Bootstrap, Interval
from loopmdm.quality.copies import counted_tokens
from loopmdm.runs.options import UsageError, loop_counts, positive_int, step_counts
from loopmdm.runs.provenance import weights_fingerprint
from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import Row, StudyFolder
from loopmdm.study.kit.inputs import Noisy, stratified
from loopmdm.study.kit.sources import BATCH, add_data, add_whole_boards, held_out, load_denoisers
from loopmdm.study.scaling.quality import board_rows, text_rows
from loopmdm.study.scaling.time import rows_of_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "likelihood, samples, hidden change and time against the number of loops"
EPILOG = """examples:
  loopmdm study scaling run --scorer scorer --samples 64 --steps 16,64 --out scaling
  loopmdm study scaling sudoku6 --boards 200 --out scaling-sudoku
"""
LATE, LATE_SHARE = 0.95, 0.25  # L9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or shipped model with a loop")
    parser.add_argument(
        "--loops",
        type=loop_counts,
        metavar="S,S,...",
        help="loop counts (default: 1, 2, 3, 4, 6, 8, 12, .. up to twice the model's max_loops)",
    )
    parser.add_argument(
        "--bins", type=positive_int, default=16, metavar="N", help="bins of t (default: %(default)s)"
    )
    samples = parser.add_argument_group("samples")
    samples.add_argument("--scorer", metavar="PATH", help="autoregressive model that rates samples of text")
    samples.add_argument(
        "--samples", type=positive_int, metavar="N", help="of text, each; without it or --scorer: none"
    )
    samples.add_argument(
        "--steps", type=step_counts, default=[16, 64], metavar="T,T,...", help="(default: 16,64)"
    )
    samples.add_argument(
        "--boards", type=positive_int, default=200, metavar="N", help="puzzles (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=15, metavar="N", help="of timing (default: %(default)s)"
    )
    add_whole_boards(parser)
    add_data(parser)


def default_loops(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, .. up to 2 S_max, with S_max and 2 S_max."""
    grid = {1, 2, 3, 4, most, 2 * most, *(2**i for i in range(2, 9)), *(3 * 2**i for i in range(1, 8))}
    return sorted(s for s in grid if s <= 2 * most)


@torch.no_grad()
def over_loops(model: LoopMDM, noisy: Noisy, loops: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the masked tokens [len(loops), B], and r_k [K, B], float64.

    K is the largest of `loops`; one forward pass of K loops, and the blocks after them for each of `loops`.
    """
    wanted = sorted(loops)
    stages = noisy.stages(model)
    rows = noisy.masked.flatten().nonzero().squeeze(1).to(model.device)
    ones = torch.ones(len(rows), device=model.device, dtype=torch.float32)
    size, length = noisy.clean.shape
    state = stages.before()
    sums, changes = [], []
    for loop in range(1, wanted[-1] + 1):
        previous, state = state, stages.loop(state, done=loop - 1)
        norms = [(x.flatten(1).double()).norm(dim=1) for x in (state - previous, state)]
        changes.append(norms[0] / norms[1])
        if loop in wanted:
            _, nll = vocabulary.masked_cross_entropy(
                stages.after(state),
                model.head(stages.sigma),
                noisy.clean.to(model.device),
                rows,
                ones,
                compute_dtype=model.compute_dtype,
            )
            sums.append(torch.zeros(size, dtype=torch.float64, device=model.device))
            sums[-1].index_add_(0, rows // length, nll.double())
    return torch.stack(sums).cpu(), torch.stack(changes).cpu()


def measured(model: LoopMDM, batch: Batch, loops: Sequence[int], bins: int, seed: int, first: int) -> Any:
    """Sums of a batch as JSON values; the last two axes are sequences and bins."""
    columns = stratified(batch, bins, seed, first)
    passes = [over_loops(model, noisy, loops) for noisy in columns]
    return {
        "tokens": counted_tokens(batch).sum(1).tolist(),
        "t": torch.stack([noisy.t for noisy in columns], dim=-1).tolist(),
        "masked": torch.stack([noisy.masked.sum(1) for noisy in columns], dim=-1).tolist(),
        "cross_entropy": torch.stack([sums for sums, _ in passes], dim=-1).tolist(),
        "change": torch.stack([change for _, change in passes], dim=-1).tolist(),
    }


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    (denoiser,) = load_denoisers(args, folder, [args.model])
    model, config = denoiser.model, denoiser.model.config
    if config.loop_start == config.loop_end:
        raise UsageError(f"{args.model} has no looped layers")
    loops = sorted(args.loops or default_loops(config.max_loops))
    if loops[0] != 1 or len(loops) < 3:
        raise UsageError(f"--loops: got {loops}, expected 1 and at least two more")
    data = held_out(args, folder, denoiser)
    if data.spec is not None and args.scorer is not None:
        raise UsageError("--scorer: it rates text, the model solves Sudoku")
    scorer = None if args.scorer is None else load_scorer(args.scorer, data.tokenizer)
    starts = [0, *accumulate(len(batch.input_ids) for batch in data.batches)]

    def measure(key: str) -> Any:
        number = int(key.split()[1])
        return measured(model, data.batches[number], loops, args.bins, args.seed, starts[number])

    parts = folder.items([f"batch {i}" for i in range(len(data.batches))], measure, "batches")
    folder.facts |= {
        "loops": loops,
        "max_loops_in_training": config.max_loops,
        "network_calls": data.num_sequences * args.bins,
        "loops_per_call": loops[-1],
        "intervals": "95 % percentile bootstrap, 2000 resamples",
        "flop_convention": "all three, named in the columns",
    }
    trained = min(loops, key=lambda s: (abs(s - config.max_loops), s))
    rows = tables(parts, loops, trained, args.seed)
    _conclude(folder, rows, trained, clues=data.puzzles)
    if data.spec is not None:
        rows += board_rows(folder, denoiser, data.spec, loops, args.boards, args.seed)
    elif args.scorer is not None or args.samples is not None:
        if isinstance(scorer, CausalScorer):
            folder.pin("weights of the scorer", weights_fingerprint(scorer.model))
        length, num = data.batches[0].input_ids.shape[1], args.samples or 64
        rows += text_rows(folder, denoiser, scorer, loops, args.steps, num, length, args.seed)
    tokens = data.batches[0].input_ids[:BATCH].to(model.device)
    return rows + rows_of_time(folder, model, tokens, loops, args.rounds)


def tables(parts: Sequence[dict[str, Any]], loops: Sequence[int], trained: int, seed: int) -> list[Row]:
    """Rows of NLL, gain and change from what `measured` returned."""
    tokens = np.concatenate([part["tokens"] for part in parts])
    t, masked = (np.concatenate([part[name] for part in parts]) for name in ("t", "masked"))
    sums, change = (
        np.concatenate([part[name] for part in parts], axis=-2) for name in ("cross_entropy", "change")
    )
    bootstrap = Bootstrap(len(tokens), seed=seed)
    bins = t.shape[-1]
    weighted = (sums / t).mean(-1)  # [loops, N]
    rows: list[Row] = []
    for row, s in zip(weighted, loops, strict=True):
        against = bootstrap.ratio(row - weighted[loops.index(trained)], tokens)
        entry: Row = {"part": "nll", "num_loops": s}
        entry |= _columns("nll", bootstrap.ratio(row, tokens))
        rows.append(entry | _columns(f"nll_less_S{trained}", against))
    for row, s in zip(sums, loops, strict=True):
        gain = bootstrap.ratio(sums[0] - row, masked)
        for j in range(bins):
            entry = {"part": "gain", "num_loops": s, "t_low": j / bins, "t_high": (j + 1) / bins}
            rows.append(entry | _columns("gain", Interval(*(values[j] for values in gain))))
    for k, values in enumerate(change, start=1):
        by_time = values.mean(0)
        entry = {"part": "change", "k": k} | _columns("r", bootstrap.mean(values.mean(-1)))
        entry |= {
            "k_times_r": k * float(values.mean()),
            "variance_over_t": float(by_time.var()),
            "least_over_t": float(by_time.min()),
            "most_over_t": float(by_time.max()),
        }
        rows.append(entry)
    return rows


def _columns(name: str, estimate: Interval) -> Row:
    return {name + end: float(value) for end, value in zip(("", "_low", "_high"), estimate, strict=True)}


def _conclude(folder: StudyFolder, rows: Sequence[Row], trained: int, *, clues: bool) -> None:
    """Conditions L1, L2 (likelihood), L7 and L9, which puzzles cannot meet: their clues stay at t = 1."""
    nll = figures.select(rows, part="nll")
    curve = ", ".join(f"{row['nll']:.4f} at S = {row['num_loops']}" for row in nll)
    values = {row["num_loops"]: row["nll"] for row in nll}
    inside = [s for s in values if 1 < s <= trained]
    improves = min(values[s] for s in inside) <= values[1] - 0.01 if inside else None
    folder.find(
        "L1", f"NLL falls by at least 0.01 from S = 1 within training (S <= {trained})", curve, improves
    )
    last = nll[-1]
    if last["num_loops"] > trained:
        name = f"nll_less_S{trained}"
        outcome = f"{last[name]:+.4f} nats [{last[f'{name}_low']:+.4f}, {last[f'{name}_high']:+.4f}]"
        condition = f"NLL at S = {last['num_loops']} is at most 0.5 % above S = {trained}"
        folder.find("L2 (soft)", condition, outcome, last["nll"] <= 1.005 * values[trained])
    gains = figures.select(rows, part="gain", num_loops=trained)
    peak = max(gains, key=lambda row: float(row["gain"]))
    late = [row["gain"] for row in gains if row["t_high"] > LATE]
    folder.find(
        "L9",
        f"G(t > 0.95; S = {trained}) < 0.25 max G, with max G > 0"
        + (" (not of puzzles, whose clues stay at t = 1)" if clues else ""),
        f"max {peak['gain']:.4f} at t = {(peak['t_low'] + peak['t_high']) / 2:.2f}, last bin {late[-1]:.4f}",
        None if clues else peak["gain"] > 0 and max(late) < LATE_SHARE * peak["gain"],
    )
    changes = figures.select(rows, part="change")
    series = " ".join(f"{row['r']:.3f}" for row in changes)
    spread = " ".join(f"{row['most_over_t'] / row['least_over_t']:.2f}" for row in changes)
    products = [row["k_times_r"] for row in changes]
    folder.find(
        "L7",
        "r_k is reported with its variance over t",
        f"r_k = {series}; largest over smallest of the bins of t: {spread};"
        f" k r_k between {min(products):.2f} and {max(products):.2f}",
        True,
    )


def draw(rows: Sequence[Row]) -> Figure:
    sampled = figures.select(rows, part="samples") or figures.select(rows, part="boards")
    figure, axes = figures.new_figure(2, 3 if sampled else 2, width=4.6)
    panels = list(axes.flatten())
    nll = figures.select(rows, part="nll")
    (difference,) = (name for name in nll[0] if name.startswith("nll_less") and name[-1].isdigit())
    trained = difference.rpartition("S")[2]
    loops = figures.column(nll, "num_loops")
    first, gains, change, seconds, *others = panels
    figures.band(first, loops, *(figures.column(nll, difference + e) for e in ("", "_low", "_high")))
    first.axvline(int(trained), color="0.5", linestyle=":")
    first.axhline(0, color="0.3", linewidth=0.8)
    best = next(row["nll"] for row in nll if row["num_loops"] == int(trained))
    first.set(xlabel="loops S", ylabel=f"NLL(S) - NLL({trained}), nats per token")
    first.set_title(f"held-out NELBO; {best:.3f} at S = {trained}, the most in training")
    _draw_gain(gains, figures.select(rows, part="gain"), loops[1:], int(trained))
    _draw_change(change, figures.select(rows, part="change"))
    _draw_time(seconds, rows)
    if others:
        quality, spare = others
        if sampled[0]["part"] == "boards":
            _draw_boards(quality, sampled, int(trained))
            spare.remove()
        else:
            _draw_samples(quality, spare, sampled)
    return figure


def _draw_gain(panel: Any, rows: Sequence[Row], loops: Sequence[int], trained: int) -> None:
    """Shaded intervals at the largest loop count of training only: those of the others overlap."""
    for color, s in enumerate(loops):
        part = figures.select(rows, num_loops=s)
        middle = [(row["t_low"] + row["t_high"]) / 2 for row in part]
        values = [figures.column(part, f"gain{end}") for end in ("", "_low", "_high")]
        style = {"color": f"C{color}", "label": f"S = {s}", "marker": "o"}
        if s == trained:
            figures.band(panel, middle, *values, **style)
        else:
            panel.plot(middle, values[0], **style)
    panel.axhline(0, color="0.3", linewidth=0.8)
    panel.set(xlim=(0, 1), xlabel=figures.TIME_LABEL, ylabel="nats per masked token")
    panel.set_title("gain over S = 1: G(t; S)")
    panel.legend(ncols=2)


def _draw_change(panel: Any, rows: Sequence[Row]) -> None:
    k = figures.column(rows, "k")
    ends = [figures.column(rows, name) for name in ("r", "least_over_t", "most_over_t")]
    figures.band(panel, k, *ends, color="C0", label="mean; shaded: bins of t")
    panel.plot(k, [rows[0]["r"] / i for i in k], color="0.5", linestyle=":", label="r_1 / k")
    panel.set(xlabel="loop k", ylabel="||H(k) - H(k-1)|| / ||H(k)||", ylim=(0, None))
    panel.set_title("relative change of the hidden state")
    panel.legend()


def _draw_time(panel: Any, rows: Sequence[Row]) -> None:
    part = figures.select(rows, part="time")
    loops = figures.column(part, "num_loops")
    (line,) = figures.select(rows, part="fit of time")
    (layers,) = figures.select(rows, part="time of the looped layers")
    panel.plot(
        loops,
        [1e3 * s for s in figures.column(part, "seconds")],
        "o",
        color="C0",
        label="fastest of the rounds",
    )
    fit = f"{1e3 * line['a']:.1f} + {1e3 * line['b']:.2f} S, R² = {line['r_squared']:.4f}"
    panel.plot(loops, [1e3 * s for s in figures.column(part, "fit_seconds")], color="C0", label=fit)
    panel.set(xlabel="loops S", ylabel="ms a forward pass", ylim=(0, None))
    panel.set_title(f"time; looped layers alone {1e3 * layers['seconds']:.2f} ms")
    panel.legend()


def _draw_boards(panel: Any, rows: Sequence[Row], trained: int) -> None:
    for order in dict.fromkeys(figures.column(rows, "order")):
        part = figures.select(rows, order=order)
        values = [figures.column(part, f"solved{end}") for end in ("", "_low", "_high")]
        label = order.replace("_", " ")
        figures.band(panel, figures.column(part, "num_loops"), *values, label=label)
    panel.axvline(trained, color="0.5", linestyle=":")
    panel.set(xlabel="loops S", ylabel="share of boards solved", ylim=(0, 1.02))
    panel.set_title(f"{rows[0]['boards']} held-out boards, one cell a step")
    panel.legend()


def _draw_samples(quality: Any, entropy: Any, rows: Sequence[Row]) -> None:
    shown = {
        quality: ("perplexity", "perplexity under the scorer"),
        entropy: ("entropy", "unigram entropy, nats"),
    }
    for panel, (name, label) in shown.items():
        if name not in rows[0]:
            panel.remove()
            continue
        for steps in dict.fromkeys(figures.column(rows, "steps")):
            part = figures.select(rows, steps=steps)
            values = [figures.column(part, f"{name}{end}") for end in ("", "_low", "_high")]
            figures.band(panel, figures.column(part, "num_loops"), *values, label=f"{steps} steps")
        panel.set(xlabel="loops S", ylabel=label, title=f"{rows[0]['samples']} ancestral samples each")
        panel.legend()
