"""Where in the denoising a light network is enough: schedules of light and heavy steps.

Model scheduling (arXiv 2604.02340), Figs 1, 3, 6 to 10 and 13. The hand-made schedules, a quarter of the
steps light, and all schedules with some of the segments light (4 of 10: 210 schedules). LIGHT and HEAVY are
two models, or one model with two loop counts (run@1 and run@4). Every schedule samples with the same random
numbers: text is rated by an autoregressive scorer (generative perplexity), Sudoku by the puzzles solved from
left to right or, with --whole-boards, by the rows, columns and boxes that are wrong on boards made from
nothing. Influence of a segment: mean score of the schedules with it light, less the mean of all.

The proxy needs no samples: the losses of held-out sequences, each state with the network that its step would
run, add up (the NELBO of a text or of whole boards; puzzles: those whose digits are all right on the way to
the solution).

Intervals are 95 % bootstraps over samples, paired between schedules.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from loopmdm.model import flops
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm.quality.bootstrap import Bootstrap, Floats, Interval
from loopmdm.runs.options import UsageError, count, positive_int, usage_errors
from loopmdm.study.kit.clock import clock
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.kit.scoring import scoring_of
from loopmdm.study.kit.sources import (
    MODEL_HELP,
    Denoiser,
    HeldOut,
    add_data,
    add_whole_boards,
    held_out,
    load_denoisers,
)
from loopmdm.study.schedules.figure import draw as draw
from loopmdm.study.schedules.proxy import Proxy
from loopmdm.study.schedules.rated import Rated
from loopmdm.study.schedules.segments import (
    Schedule,
    enumerate_schedules,
    hand_schedules,
    schedule_text,
    segment_frequency,
    segment_influence,
)

SUMMARY = "schedules of light and heavy steps: hand-made, and all with some segments light"
EPILOG = """examples:
  loopmdm study schedules sudoku6@6 sudoku6@2 --windows 200 --steps 30 --out schedules
  loopmdm study schedules heavy light --scorer scorer --num 256 --steps 50 --out schedules-text
  loopmdm study schedules heavy light --scorer scorer --prefix 32 --out schedules-prefix
  loopmdm study schedules heavy6x6 light6x6 --whole-boards --num 256 --steps 40 --out schedules-boards

The best schedule is saved as best-plan.json.
"""
Row = dict[str, Any]
_TOP = 20  # best and worst schedules that are looked at, of many
_EARLY_AND_LATE, _MIDDLE = (0, 1, 8, 9), (3, 4, 5, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heavy", metavar="HEAVY", help=MODEL_HELP)
    parser.add_argument("light", metavar="LIGHT", help="as HEAVY")
    parser.add_argument(
        "--by",
        choices=("both", "sampling", "proxy"),
        default="both",
        help="what schedules are rated by (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=20, metavar="T", help="denoising steps (default: %(default)s)"
    )
    parser.add_argument(
        "--segments", type=positive_int, default=10, metavar="N", help="of a schedule (default: %(default)s)"
    )
    parser.add_argument(
        "--light-segments", type=count, default=4, metavar="N", help="of these, light (default: %(default)s)"
    )
    parser.add_argument(
        "--scorer",
        metavar="DIR",
        help="text: run of `loopmdm train --autoregressive`, or a causal language model of transformers",
    )
    parser.add_argument(
        "--num",
        type=positive_int,
        default=64,
        metavar="N",
        help="text and whole boards: samples (default: %(default)s)",
    )
    parser.add_argument(
        "--prefix",
        type=count,
        default=0,
        metavar="P",
        help="text: tokens given of held-out sequences (default: 0)",
    )
    parser.add_argument(
        "--num-t",
        type=positive_int,
        default=40,
        metavar="N",
        help="text and whole boards: times per sequence of the proxy (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=count,
        default=5,
        metavar="N",
        help="timings of the hand-made schedules (default: %(default)s)",
    )
    add_whole_boards(parser)
    add_data(parser)


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    heavy, light = load_denoisers(args, folder, [args.heavy, args.light])
    with usage_errors():
        named = {**hand_schedules(), **_enumerated(args.segments, args.light_segments)}
        texts = {name: schedule_text(schedule, args.steps) for name, schedule in named.items()}
        plans = {
            name: ComputePlan.parse(text, light=_compute(light, heavy), heavy=_compute(heavy, heavy))
            for name, text in texts.items()
        }
    data = held_out(args, folder, heavy)
    length = data.batches[0].input_ids.shape[1]
    rated: dict[str, Rated] = {}
    drawn: list[dict[str, Any]] = []
    if args.by != "proxy":
        scoring, num = scoring_of(args, heavy.model, data)
        if scoring is None:
            raise UsageError("--scorer: text samples need a scorer; give one, or --by proxy")
        drawn = folder.items(plans, lambda name: scoring.evaluate(plans[name], num), "schedules sampled")
        losses = np.array([values["losses"] for values in drawn]).T
        rated[scoring.measure] = Rated(losses, scoring.perplexity, Bootstrap(num, seed=args.seed))
        folder.facts["samples"] = num
    if args.by != "sampling":
        proxy = Proxy.of(folder, light, heavy, data, args.steps, num_t=args.num_t, seed=args.seed)
        groups = [list(hand_schedules()), [name for name in named if name not in hand_schedules()]]
        losses = np.hstack([proxy.losses([named[name] for name in names]) for names in groups])
        rated[proxy.measure] = Rated(losses, False, Bootstrap(len(losses), seed=args.seed))
    folder.facts |= {
        "T": args.steps,
        "light": light.name,
        "heavy": heavy.name,
        "FLOP conventions": list(flops.CONVENTIONS),
    }
    if not data.puzzles:
        expected = args.steps * (1 - (1 - 1 / args.steps) ** (length - args.prefix))
        folder.facts["expected network calls of a sequence"] = expected
    rows = _schedule_rows(named, texts, plans, heavy, length, rated, drawn)
    if args.by != "proxy" and args.repeats:
        _clock(args, folder, heavy, data, plans, rows)
    rows += _segment_rows(named, rated, args.segments, args.light_segments)
    _find(folder, rows, rated, list(named), args.segments)
    _save_best(folder, rows, plans)
    return rows


def _enumerated(segments: int, light: int) -> dict[str, Schedule]:
    schedules = enumerate_schedules(segments, light)
    return {"".join("L" if part else "H" for part in schedule): schedule for schedule in schedules}


def _compute(denoiser: Denoiser, sampled: Denoiser) -> Any:
    """What a plan of samples of `sampled.model` runs: a loop count where the model is the same."""
    if denoiser.model is sampled.model:
        return denoiser.num_loops
    return StepCompute(denoiser.model, denoiser.num_loops)


def _schedule_rows(
    named: dict[str, Schedule],
    texts: dict[str, str],
    plans: dict[str, ComputePlan],
    heavy: Denoiser,
    length: int,
    rated: dict[str, Rated],
    drawn: Sequence[dict[str, Any]],
) -> list[Row]:
    rows = []
    costs = {name: plan.ledger(heavy.model.config, length) for name, plan in plans.items()}
    all_heavy = list(named).index("all heavy")
    for index, (name, text) in enumerate(texts.items()):
        row: Row = {"part": "hand" if name in hand_schedules() else "enumerated", "name": name, "plan": text}
        for convention, cost in costs[name].items():
            row[f"saved, {convention}"] = 1 - cost.flops / costs["all heavy"][convention].flops
        for measure, ratings in rated.items():
            row |= _columns(measure, ratings.score(index))
            row |= _columns(f"{measure}, over all heavy", ratings.over(index, all_heavy))
        if drawn:
            spent, base = drawn[index], drawn[all_heavy]
            for convention, cost in spent["flops"].items():
                row[f"saved in the run, {convention}"] = 1 - cost / base["flops"][convention]
            row |= {key: value for key, value in spent.items() if key not in ("losses", "flops")}
        rows.append(row)
    return rows


def _segment_rows(
    named: dict[str, Schedule], rated: dict[str, Rated], segments: int, light: int
) -> list[Row]:
    """Influence and frequencies, where the enumerated schedules differ."""
    names = [name for name in named if name not in hand_schedules()]
    if not 0 < light < segments:
        return []
    schedules = [named[name] for name in names]
    columns = [list(named).index(name) for name in names]
    top = min(_TOP, max(1, len(names) // 4))
    rows: list[Row] = [
        {"part": "segment", "segment": j, "t": round(1 - (j + 0.5) / segments, 6)} for j in range(segments)
    ]
    for measure, ratings in rated.items():
        point, resampled = ratings.point[columns], ratings.resampled[:, columns]
        influence = ratings.boot.interval(
            segment_influence(schedules, point), segment_influence(schedules, resampled)
        )
        extremes = segment_frequency(schedules, point, top)
        spread = segment_frequency(schedules, resampled, top)
        intervals = [ratings.boot.interval(*pair) for pair in zip(extremes, spread, strict=True)]
        for j, row in enumerate(rows):
            for what, interval in zip(
                ("influence", f"in the {top} best", f"in the {top} worst"),
                (influence, *intervals),
                strict=True,
            ):
                row |= _columns(f"{measure}, {what}", Interval(*(field[j] for field in interval)))
    return rows


def _clock(
    args: argparse.Namespace,
    folder: StudyFolder,
    heavy: Denoiser,
    data: HeldOut,
    plans: dict[str, ComputePlan],
    rows: list[Row],
) -> None:
    timed = {name: plans[name] for name in ("all heavy", "sandwich", "all light")}
    clocked = clock(
        folder,
        heavy.model,
        data,
        timed,
        "all heavy",
        repeats=args.repeats,
        steps=args.steps,
        seed=args.seed,
    )
    for row in rows:
        row |= {key: value for key, value in clocked.get(row["name"], {}).items() if key.endswith("_saved")}


def _find(
    folder: StudyFolder, rows: Sequence[Row], rated: dict[str, Rated], names: list[str], segments: int
) -> None:
    sandwich = next(row for row in rows if row["name"] == "sandwich")
    folder.find(
        "M5",
        "what the sandwich saves, by convention",
        ", ".join(f"{c}: {sandwich[f'saved, {c}']:.4f}" for c in flops.CONVENTIONS)
        + "".join(
            f"; {sandwich['clock_saved']:.4f} on the clock, {sandwich['ledger_saved']:.4f} in its ledger"
            for _ in range("clock_saved" in sandwich)
        ),
        sandwich["clock_saved"] >= 0.8 * sandwich["ledger_saved"] if "clock_saved" in sandwich else None,
    )
    for measure, ratings in rated.items():
        quarters = [names.index(name) for name in ("sandwich", "light in quarter 2", "light in quarter 3")]
        with_draws = np.vstack([ratings.point, ratings.resampled])[:, quarters]
        lead = with_draws[:, 1:].max(1) - with_draws[:, 0]
        _report(
            folder,
            "M3",
            measure,
            "the sandwich is better than the worse of light in quarter 2 and 3",
            lead,
            ratings,
        )
        found = [row for row in rows if row["part"] == "segment"]
        if segments != 10 or not found:
            continue
        schedules = [tuple(part == "L" for part in name) for name in names if set(name) <= {"L", "H"}]
        columns = [index for index, name in enumerate(names) if set(name) <= {"L", "H"}]
        influence = segment_influence(schedules, np.vstack([ratings.point, ratings.resampled])[:, columns])
        gap = influence[:, _MIDDLE].mean(1) - influence[:, _EARLY_AND_LATE].mean(1)
        _report(
            folder,
            "M4",
            measure,
            "segments 3-6 do more harm when light than segments 0, 1, 8, 9",
            gap,
            ratings,
        )


def _report(
    folder: StudyFolder, name: str, measure: str, condition: str, draws: Floats, ratings: Rated
) -> None:
    """A soft condition: `draws` is positive where it holds, the estimate first, then its resamples."""
    interval = ratings.boot.interval(draws[0], draws[1:])
    low, high = float(interval.low), float(interval.high)
    outcome = f"{measure}: {float(interval.value):+.4g} [{low:+.4g}, {high:+.4g}]"
    folder.find(
        name, f"{condition} (reported only)", outcome, True if low > 0 else False if high < 0 else None
    )


def _save_best(folder: StudyFolder, rows: Sequence[Row], plans: dict[str, ComputePlan]) -> None:
    scored = [row for row in rows if row["part"] == "enumerated"]
    measure = next(name for name in rows[0] if f"{name}, over all heavy" in rows[0])
    best = min(scored, key=lambda row: float(row[measure]))
    folder.write_plan("best-plan.json", plans[best["name"]])


def _columns(name: str, interval: Interval) -> Row:
    return {
        name: float(interval.value),
        f"{name}, low": float(interval.low),
        f"{name}, high": float(interval.high),
    }
