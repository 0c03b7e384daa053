"""Search a plan: the loops of each part of the denoising that lose least within a budget of mean loops.

The losses of held-out sequences add up over the denoising (text and whole boards: the parts of the NELBO;
puzzles: the next digits' on the way to the solution), so each part is evaluated once at each loop count, and
a dynamic program finds the best tables. The few best, and fixed loop counts beside them, then sample: puzzles
are rated by boards solved from left to right, boards made from nothing by the rows, columns and boxes that
are wrong, text with --scorer by generative perplexity. Every other sequence searches and chooses, the others
are reported. The chosen plan is saved as plan.json, for `sample(plan=...)`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loopmdm.plan import ComputePlan
from loopmdm.quality.bootstrap import Bootstrap, Interval
from loopmdm.runs.options import UsageError, positive_float, positive_int, usage_errors
from loopmdm.study.adaptive.criteria import quality
from loopmdm.study.adaptive.policies import Outcome, fixed_stops, outcome, table_stops
from loopmdm.study.adaptive.tables import Table, best_tables, bin_losses
from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.kit.scoring import MEASURES, Scoring, scoring_of
from loopmdm.study.kit.sources import add_data, add_whole_boards, held_out, load_denoisers
from loopmdm.study.kit.traces import Trace, add_trace_options, record_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "search loops over the denoising under a budget, and save the plan"
EPILOG = """examples:
  loopmdm study search sudoku6 --loops 3 --cap 12 --windows 400 --out plan3
  loopmdm solve puzzles.txt --model sudoku6 --order left_to_right --plan plan3/plan.json
  loopmdm study search run --loops 2 --scorer scorer --out plan2
  loopmdm study search boards --loops 2 --whole-boards --num 512 --out plan-boards
"""
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or shipped model")
    parser.add_argument(
        "--loops",
        type=positive_float,
        required=True,
        metavar="S",
        help="budget: mean loops of a network call",
    )
    add_trace_options(parser)
    parser.add_argument(
        "--bins",
        type=positive_int,
        default=10,
        metavar="N",
        help="parts of the denoising (default: %(default)s)",
    )
    parser.add_argument(
        "--best",
        type=positive_int,
        default=5,
        metavar="N",
        help="tables that are verified (default: %(default)s)",
    )
    parser.add_argument(
        "--scorer", metavar="DIR", help="text: an autoregressive scorer, to verify by sampling"
    )
    parser.add_argument(
        "--num",
        type=positive_int,
        default=64,
        metavar="N",
        help="text and whole boards: samples (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=64,
        metavar="T",
        help="text and whole boards: denoising steps (default: %(default)s)",
    )
    add_whole_boards(parser)
    add_data(parser)


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    (denoiser,) = load_denoisers(args, folder, [args.model])
    data = held_out(args, folder, denoiser)
    model = denoiser.model
    cap = args.cap or denoiser.num_loops
    if not 1 <= args.loops <= cap:
        raise UsageError(f"--loops: got {args.loops:g}, expected 1 to {cap}, the most loops (--cap)")
    if data.num_sequences < 4:
        raise UsageError(f"--windows: got {data.num_sequences}, expected at least 4: half of them choose")
    with usage_errors():
        scoring, num = scoring_of(args, model, data)
    trace = record_trace(folder, model, data, cap, num_t=args.num_t, seed=args.seed)
    searched, verified = trace[0::2], trace[1::2]
    losses, states = bin_losses(searched, args.bins)
    tables = best_tables(losses, states, args.loops, args.best)
    fixed = sorted({math.floor(args.loops), math.ceil(args.loops), cap})
    plans = {",".join(map(str, table.loops)): ComputePlan.by_mask_ratio(table.loops) for table in tables}
    plans |= {f"S = {loops}": ComputePlan.constant(loops) for loops in fixed}
    rows = [_proxy_row(searched, verified, table, args.seed) for table in tables]
    rows += [_proxy_row(searched, verified, loops, args.seed) for loops in fixed]
    if scoring is not None:
        _sampled(folder, scoring, num, plans, rows, args.seed)
    measure = rows[0]["measure"] if scoring is None else scoring.measure
    best = min(rows[: len(tables)], key=lambda row: (row.get("choice", 0.0), row["searched_loss"]))
    best["saved"] = True
    folder.write_plan("plan.json", plans[best["plan"]])
    folder.facts |= {"cap": cap, "budget of mean loops": args.loops, "bins": args.bins}
    reference = next(row for row in rows if row["plan"] == f"S = {math.floor(args.loops)}")
    folder.find(
        "learned plan",
        "better than the fixed S of at most the budget, reported only",
        f"{best['plan']}: {measure} {best[measure]:.4f} at {best['mean_loops']:.2f} loops;"
        f" {reference['plan']}: {reference[measure]:.4f}",
        None,
    )
    return rows


def _proxy_row(searched: Trace, verified: Trace, what: Table | int, seed: int) -> Row:
    """One plan on the traces: its loss where it was searched, and its quality on the other half."""

    def result(trace: Trace) -> Outcome:
        if isinstance(what, int):
            return outcome(trace, fixed_stops(trace, what))
        return outcome(trace, table_stops(trace, what.loops))

    there = result(verified)
    boot = Bootstrap(len(there.loss), seed=seed)
    value, sign = quality(there)
    measure = "share of boards not solved (proxy)" if sign > 0 else "NELBO (nats per token)"
    return {
        "plan": f"S = {what}" if isinstance(what, int) else ",".join(map(str, what.loops)),
        "searched_loss": float(result(searched).loss.mean()),
        "mean_loops": float(there.loops.sum() / there.states.sum()),
        "measure": measure,
        **_columns(measure, boot.mean(1 - value if sign > 0 else value)),
        "saved": False,
    }


def _sampled(
    folder: StudyFolder,
    scoring: Scoring,
    num: int,
    plans: dict[str, ComputePlan],
    rows: Sequence[Row],
    seed: int,
) -> None:
    """Adds to each row what sampling under its plan gives: on one half to choose, on the other to report."""
    drawn = folder.items(plans, lambda name: scoring.evaluate(plans[name], num), "plans sampled")
    boot = Bootstrap(num // 2, seed=seed)
    for row, values in zip(rows, drawn, strict=True):
        losses = np.array(values["losses"])
        reported = losses[1::2]
        row["choice"] = float(scoring.score(losses[0::2].mean(0)))
        row |= _columns(
            scoring.measure,
            boot.interval(scoring.score(reported.mean(0)), scoring.score(boot.means(reported))),
        )
        row |= {key: value for key, value in values.items() if key not in ("losses", "flops")}
        row["FLOPs, blocks+head"] = values["flops"]["blocks+head"]


def draw(rows: Sequence[Row]) -> Figure:
    """The best tables over the denoising, and what plans give at their mean loops."""
    figure, ((left, right),) = figures.new_figure(1, 2, width=5.2)
    measure = next((name for name in MEASURES if name in rows[0]), rows[0]["measure"])
    for row in rows:
        if row["plan"].startswith("S"):
            continue
        loops = [int(part) for part in row["plan"].split(",")]
        edges = [1 - index / len(loops) for index in range(len(loops) + 1)]
        strong = row["saved"]
        left.stairs(
            loops[::-1],
            edges[::-1],
            baseline=None,
            linewidth=2.2 if strong else 0.8,
            color="C0" if strong else "grey",
            label="saved" if strong else None,
        )
    left.set_xlabel("t (share of what is to fill that is masked; 1 = start)")
    left.set_ylabel("loops S")
    left.set_title("the best tables")
    left.legend()
    for kind, color in (("tables", "C0"), ("fixed S", "C1")):
        points = [row for row in rows if row["plan"].startswith("S") == (kind == "fixed S")]
        x, value, low, high = (
            figures.column(points, name)
            for name in ("mean_loops", measure, f"{measure}, low", f"{measure}, high")
        )
        figures.error_bars(right, x, value, low, high, label=kind, color=color)
    right.set_xlabel("mean loops of a network call")
    right.set_ylabel(f"{measure}\n(95 % interval)")
    right.set_title("less is better")
    right.legend()
    return figure


def _columns(name: str, interval: Interval) -> Row:
    return {
        name: float(interval.value),
        f"{name}, low": float(interval.low),
        f"{name}, high": float(interval.high),
    }
