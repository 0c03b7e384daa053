"""Loops where they help: criteria that stop the loop, against fixed loop counts at equal mean loops.

LoopMDM, Fig. 6: mean loops against t for several thresholds, and quality against mean loops. The criteria are
those of `loopmdm.exits` (change of the hidden state, change of the output, stable most probable tokens, a
logistic gate fitted here) and a table of loops over the denoising, searched here under budgets of mean loops.

Sudoku models are judged by the share of puzzles solved from left to right, text models (and, with
--whole-boards, models of boards without clues) by the NELBO. One half of the sequences fits the gate and the
tables and chooses each criterion's setting: of those as good as the cap, the one of fewest loops. All figures
are of the other half, with 95 % bootstrap intervals over sequences.
At equal mean loops a fixed count is a mixture of the two next to it. Then the chosen settings sample a
batch of 16, and the clock is compared with the ledger.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loopmdm.runs.options import UsageError, positive_int
from loopmdm.study.adaptive.criteria import FIXED, GATE, HIDDEN, TABLE, Judge, Policy, catalogue, choose
from loopmdm.study.kit import figures
from loopmdm.study.kit.clock import clock
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.kit.sources import add_data, add_whole_boards, held_out, load_denoisers
from loopmdm.study.kit.traces import add_trace_options, record_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "loops against t, and quality against mean loops for every criterion"
EPILOG = """examples:
  loopmdm study adaptive sudoku6 --windows 800 --out adaptive
  loopmdm study adaptive run --cap 8 --out adaptive-text
  loopmdm study adaptive boards --whole-boards --cap 12 --out adaptive-boards

The chosen gate and table are saved as gate.json and table-plan.json, for `sample(plan=...)`.
"""
Row = dict[str, Any]
_SHOWN_EPS = ("eps=0.2", "eps=0.15", "eps=0.1", "eps=0.07")
_ALLOCATION_BINS = 10
_LEAST_SAVING, _CLOCK_SHARE = 0.25, 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or shipped model")
    add_trace_options(parser)
    parser.add_argument(
        "--bins",
        type=positive_int,
        default=10,
        metavar="N",
        help="entries of the tables of loops (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=5,
        metavar="N",
        help="timings of each chosen setting (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=64,
        metavar="T",
        help="text and whole boards: steps of the timed runs (default: %(default)s)",
    )
    add_whole_boards(parser)
    add_data(parser)


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    (denoiser,) = load_denoisers(args, folder, [args.model])
    data = held_out(args, folder, denoiser)
    model = denoiser.model
    cap = args.cap or denoiser.num_loops
    if cap < 2:
        raise UsageError(f"--cap: got {cap}: with one loop there is nothing to stop")
    if data.num_sequences < 4:
        raise UsageError(f"--windows: got {data.num_sequences}, expected at least 4: half of them choose")
    trace = record_trace(folder, model, data, cap, num_t=args.num_t, seed=args.seed)
    choosing, reported = trace[0::2], trace[1::2]
    policies = catalogue(choosing, cap, args.bins)
    chosen = {policy.name: policy for policy in choose(policies, choosing, cap)}
    judge = Judge(reported, cap, model.config, data.batches[0].input_ids.shape[1], args.seed)
    at_cap = next(policy for policy in policies if policy.criterion == FIXED and policy.loops == [cap])
    timed = {policy.name: policy.plan for policy in (at_cap, *chosen.values())}
    clocked = clock(
        folder, model, data, timed, at_cap.name, repeats=args.repeats, steps=args.steps, seed=args.seed
    )
    rows = []
    for policy in policies:
        row = judge.row(policy) | {"chosen": policy.name in chosen}
        row["as_good_as_cap"] = judge.within_margin(row)
        rows.append(row | clocked.get(policy.name, {}))
    _find(folder, rows, cap, judge.margin)
    shown = [p for p in policies if p.criterion == HIDDEN and p.setting in _SHOWN_EPS]
    shown += [p for p in chosen.values() if p.criterion not in (FIXED, HIDDEN)]
    for policy in shown:
        rows += judge.allocation(policy, _ALLOCATION_BINS)
    _save_plans(folder, list(chosen.values()))
    folder.facts |= {
        "cap": cap,
        "reported sequences": len(reported.share),
        "network calls of the trace": int(trace.there.sum()),
        "FLOP convention": "blocks+head; call_flops: blocks, and tail and head where a criterion predicts",
    }
    return rows


def _save_plans(folder: StudyFolder, chosen: Sequence[Policy]) -> None:
    names = {GATE: "gate.json", TABLE: "table-plan.json"}
    for policy in chosen:
        if policy.criterion in names:
            folder.write_plan(names[policy.criterion], policy.plan)


def _find(folder: StudyFolder, rows: Sequence[Row], cap: int, margin: float) -> None:
    fixed = [row for row in rows if row["criterion"] == FIXED]
    best = max(fixed, key=lambda row: float(row["gain_over_cap"]))
    least = best["gain_over_cap"] - margin
    good = [row for row in rows if row["criterion"] == HIDDEN and row["gain_over_cap"] >= least]
    saver = min(good, key=lambda row: float(row["mean_loops"]), default=None)
    folder.find(
        "L6",
        f"some eps saves a quarter of the loops of the cap S = {cap} and is as good as the best fixed S",
        "none is as good"
        if saver is None
        else f"{saver['setting']}: {saver['mean_loops']:.2f} loops, quality {saver['value']:.4f}; best fixed:"
        f" S = {best['setting']}, {best['value']:.4f}",
        saver is not None and bool(saver["loops_saved"] >= _LEAST_SAVING),
    )
    chosen = [row for row in rows if row["chosen"] and row["criterion"] != FIXED]
    for row in chosen:
        folder.find(
            f"equal loops, {row['criterion']}",
            "the setting chosen on other sequences beats a fixed S at equal mean loops, reported only",
            f"{row['setting']}: {row['value']:.4f} at {row['mean_loops']:.2f} loops,"
            f" gain over fixed {_with_interval(row, 'gain_over_fixed')}",
            None,
        )
    if not chosen:
        return
    most = max(chosen, key=lambda row: float(row["clock_saved"]))
    folder.find(
        "saving",
        f"the criterion that saves most time saves at least {_LEAST_SAVING:.0%} of the loops of the cap"
        f" S = {cap} at equal quality",
        f"{most['criterion']} {most['setting']}: {most['loops_saved']:.1%} of the loops and"
        f" {most['flops_saved']:.1%} of the FLOPs saved, quality {most['value']:.4f},"
        f" gain over the cap {_with_interval(most, 'gain_over_cap')}",
        bool(most["loops_saved"] >= _LEAST_SAVING and most["as_good_as_cap"]),
    )
    folder.find(
        "clock",
        f"its clock saves at least {_CLOCK_SHARE:.0%} of what its ledger saves, batch 16",
        f"{most['clock_saved']:.1%} on the clock, {most['ledger_saved']:.1%} in the ledger",
        bool(most["clock_saved"] >= _CLOCK_SHARE * most["ledger_saved"]),
    )


def _with_interval(row: Row, name: str) -> str:
    return f"{row[name]:+.4f} [{row[f'{name}_low']:+.4f}, {row[f'{name}_high']:+.4f}]"


def draw(rows: Sequence[Row]) -> Figure:
    """Loops against t; quality against mean loops; quality against FLOPs."""
    figure, axes = figures.new_figure(1, 3, width=5.2, height=3.8)
    allocation, by_loops, by_flops = axes[0]
    against_t = [row for row in rows if row["part"] == "loops against t"]
    for name in dict.fromkeys((row["criterion"], row["setting"]) for row in against_t):
        points = [row for row in against_t if (row["criterion"], row["setting"]) == name]
        columns = ("t", "mean_loops", "mean_loops_low", "mean_loops_high")
        label = name[0] if name[0] == TABLE else " ".join(name)
        figures.band(allocation, *(figures.column(points, column) for column in columns), label=label)
    allocation.set_xlabel("t (share of what is to fill that is masked; 1 = start)")
    allocation.set_ylabel("mean loops")
    allocation.set_title("loops against t")
    allocation.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    measured = [row for row in rows if row["part"] == "quality"]
    boards = measured[0]["measure"] == "share of boards solved"
    for panel, x in ((by_loops, "mean_loops"), (by_flops, "call_flops")):
        for index, criterion in enumerate(dict.fromkeys(row["criterion"] for row in measured)):
            points = sorted(figures.select(measured, criterion=criterion), key=lambda row: float(row[x]))
            at = [row[x] if x == "mean_loops" else row[x] / 1e6 for row in points]
            value, low, high = zip(*(_shown(row, boards) for row in points), strict=True)
            options = {"label": criterion, "color": f"C{index}"}
            if criterion == FIXED:
                figures.band(panel, at, value, low, high, **options)
            else:
                panel.plot(at, value, marker="o", **options)
        panel.set_ylabel(
            "share of boards solved" if boards else "NELBO less that of the cap (nats per token)"
        )
        panel.legend(fontsize=8)
    by_loops.set_xlabel("mean loops of a network call")
    by_loops.set_title("quality at equal loops")
    by_flops.set_xlabel("MFLOP of a network call\n(with what a criterion predicts)")
    by_flops.set_title("quality at equal FLOPs")
    return figure


def _shown(row: Row, boards: bool) -> tuple[float, float, float]:
    """Quality with its interval; a NELBO against the cap's, whose texts are the same."""
    if boards:
        return row["value"], row["value_low"], row["value_high"]
    return -row["gain_over_cap"], -row["gain_over_cap_high"], -row["gain_over_cap_low"]
