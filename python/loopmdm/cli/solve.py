"""Solve Sudoku puzzles with a looped masked diffusion model.

Every puzzle is solved at several loop counts S and in one or two decoding orders; the table compares the
shares solved. Clues are fixed tokens, the digits are the model's most probable ones, one cell a step.
A puzzle without a solution, or with several, is named and not counted in the shares.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loopmdm.cli.decoding import add_pace, decoding_of
from loopmdm.cli.output import has_color, print_json, print_table, show
from loopmdm.cli.parser import add_json, add_runtime, set_up
from loopmdm.cli.plans import (
    adaptive,
    adapts,
    add_plan,
    load_looped,
    looped_otherwise,
    looping,
    note_beyond_training,
    plan_option,
)
from loopmdm.cli.views import Views, add_views
from loopmdm.data.sudoku import (
    PuzzleFile,
    count_solutions,
    encode_boards,
    format_board,
)
from loopmdm.model import LoopMDM
from loopmdm.plan import ComputePlan
from loopmdm.runs.boards import (
    ORDERS,
    SEVERAL,
    SHARE_COLUMNS,
    Solved,
    given_puzzles,
    not_counted,
    share_row,
    solve_all,
)
from loopmdm.runs.models import SHIPPED, default_loops
from loopmdm.runs.options import UsageError, loop_counts, positive_int, usage_errors
from loopmdm.sampling import ORDERS as SAMPLING_ORDERS
from loopmdm.sampling import Decoding, SampleResult
from loopmdm.sampling.sampler import sample_with
from loopmdm.solve import to_fill
from loopmdm.terminal import note
from loopmdm.view import BoardSymbols
from loopmdm.view.painters import BoardPainter

EPILOG = """examples:
  loopmdm solve puzzles.txt --loops 1,3,8 --order both
  loopmdm solve 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
  loopmdm solve puzzles.txt --adaptive 0.2 --order confidence
  loopmdm solve puzzles.csv --model run --json > answers.json
  loopmdm solve puzzles.txt --watch --watch-delay 0.1 --html boards.html

forms of FILE (docs/inputs.md says more); a blank is any of . 0 _ * - x:
  53..7....6..195....98...      a board a line: 81 (9x9), 36 (6x6) or 16 (4x4) cells
  source,question,answer,...    a table: columns between commas, tabs, semicolons or spaces, named by a
                                header (puzzle, quiz, question; solution, answer) or known by their boards
  53..7....                     a board over several lines: .sdk, .ss, as printed here; cells side by side or
  6..195...                     between spaces, commas, bars
  "53..7.... 6..195... ..."     a board itself
  -                             standard input, in all of these forms
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "puzzles",
        metavar="FILE",
        help="puzzles of 9x9, 6x6 or 4x4 in the forms below, compressed or not; - for standard input; or one"
        " board itself, in quotes",
    )
    parser.add_argument(
        "--model", help=f"{', '.join(SHIPPED)} or a folder (default: the shipped model of the board's size)"
    )
    parser.add_argument(
        "--loops",
        type=loop_counts,
        metavar="S,S,...",
        help="loop counts (default: 1, half and all of the model's most; with --adaptive, all)",
    )
    add_plan(parser, "--plan", default="--loops")
    parser.add_argument(
        "--order",
        choices=[*sorted(SAMPLING_ORDERS), "both"],
        default="both",
        help="which cell is filled next (default: both left_to_right and confidence)",
    )
    add_pace(parser)
    parser.add_argument("--limit", type=positive_int, metavar="N", help="solve the first N puzzles only")
    parser.add_argument(
        "--boards",
        type=positive_int,
        default=3,
        metavar="N",
        help="boards to print, to watch and on the page (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=64,
        metavar="B",
        help="puzzles at once (default: %(default)s)",
    )
    add_json(parser, "answers and figures")
    add_views(parser, sequences="boards", html_loops=64)
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    views = Views(args)
    puzzles = given_puzzles(args.puzzles)
    clues = puzzles.clues[: args.limit]
    device = set_up(args)
    name = args.model or _default_model(puzzles)
    model = load_looped(args, name, device)
    orders = ORDERS if args.order == "both" else (args.order,)
    with usage_errors():
        plans = _plans(args, model, device)
    decodings = [decoding_of(args, order=o, plan=p, temperature=0.0) for o in orders for p in plans]
    note_beyond_training(model, plans)
    fits = (model.config.vocab_size, model.config.mask_token_id) == (
        puzzles.spec.vocab_size,
        puzzles.spec.mask_token_id,
    )
    shown = None
    if views.wanted and fits:  # else solving says what is wrong
        shown = _show(args, views, model, name, puzzles, decodings[-1])
    solutions = count_solutions(puzzles.spec, clues, limit=SEVERAL, threads=args.threads or 1)
    solved = solve_all(
        model,
        puzzles.spec,
        clues,
        decodings,
        batch_size=args.batch_size,
        progress=True,
        counted=solutions == 1,
        last_first=shown,
    )
    if args.json:
        results = [{**one.to_dict(), "answers": _answers(puzzles, one, solutions)} for one in solved]
        print_json(
            {
                "model": name,
                **looping(args),
                "size": str(puzzles.spec),
                "puzzles": len(clues),
                "no_solution": int((solutions == 0).sum()),
                "several_solutions": int((solutions == SEVERAL).sum()),
                "results": results,
            }
        )
        return views.status
    _print_boards(puzzles, solved[-1], args.boards, solutions)
    show(f"{len(clues)} puzzles of {puzzles.spec}, model {name}{looped_otherwise(args)}")
    for line in not_counted(puzzles, solutions):
        print(line)
    print()
    print_table(SHARE_COLUMNS, [share_row(one.to_dict()) for one in solved])
    return views.status


def _plans(args: argparse.Namespace, model: LoopMDM, device: torch.device) -> list[ComputePlan]:
    """A plan for each of the loop counts, or the one that is asked for."""
    if args.plan is not None:
        if args.loops is not None:
            raise UsageError("--loops: it does not go with --plan, which says how many")
        return [plan_option(args, device)]
    if adapts(args):
        return [adaptive(args, most) for most in args.loops or (model.config.max_loops,)]
    if args.light is not None or args.heavy is not None:
        plan_option(args, device)  # says that they belong to a plan
    return [ComputePlan.constant(count) for count in args.loops or default_loops(model)]


def _show(
    args: argparse.Namespace,
    views: Views,
    model: LoopMDM,
    name: str,
    puzzles: PuzzleFile,
    decoding: Decoding,
) -> SampleResult:
    """Solve the first boards with the views on: in the order and with the loops whose answers are printed."""
    spec = puzzles.spec
    clues = puzzles.clues[: min(args.boards, args.limit or args.boards)]
    canvas = to_fill(spec, clues)
    symbols = BoardSymbols(spec)
    return views.run(
        partial(sample_with, model, decoding, infill=canvas),
        model,
        canvas,
        decoding,
        symbols,
        partial(BoardPainter, symbols),
        titles=[f"line {line}" for line in puzzles.lines[: len(clues)]],
        title=f"{spec} Sudoku",
        facts={"model": name, "order": decoding.order.replace("_", " ")},
    )


def _default_model(puzzles: PuzzleFile) -> str:
    for name, spec in SHIPPED.items():
        if spec == puzzles.spec:
            return name
    raise ValueError(
        f"no model for {puzzles.spec} boards comes with this package, only {', '.join(SHIPPED)};"
        " give one with --model"
    )


def _answers(puzzles: PuzzleFile, solved: Solved, solutions: NDArray[np.int32]) -> list[dict[str, Any]]:
    result = solved.result
    clues = encode_boards(puzzles.spec, puzzles.clues[: len(result.boards)])
    answers = encode_boards(puzzles.spec, result.boards)
    return [
        {
            "line": int(puzzles.lines[i]),
            "puzzle": clues[i],
            "answer": answers[i],
            "valid": bool(result.valid[i]),
            "fits_clues": bool(result.fits_clues[i]),
            "solved": bool(result.solved[i]),
            "solutions": int(solutions[i]),  # 2: two or more
            "loops": int(result.loops[i]),
            "network_calls": int(result.network_calls[i]),
        }
        for i in range(len(answers))
    ]


def _verdict(solved: bool, solutions: int) -> str:
    if solutions == 0:
        return "this puzzle has no solution"
    if solutions == 1:
        return "solved" if solved else "wrong"
    return "this puzzle has several solutions, and this is " + ("one of them" if solved else "none of them")


def _print_boards(puzzles: PuzzleFile, solved: Solved, most: int, solutions: NDArray[np.int32]) -> None:
    """Each puzzle beside its answer; what the order and loop count were is said once."""
    shown = min(most, len(solved.result.boards))
    color = has_color()
    what = str(solved.decoding.plan) if solved.num_loops is None else f"S = {solved.num_loops}"
    print(f"Answers at {what}, {solved.decoding.order.replace('_', ' ')} order:\n")
    for i in range(shown):
        left = format_board(puzzles.spec, puzzles.clues[i], color=False).splitlines()
        right = format_board(
            puzzles.spec, solved.result.boards[i], clues=puzzles.clues[i], color=color
        ).splitlines()
        verdict = _verdict(bool(solved.result.solved[i]), int(solutions[i]))
        print(f"line {puzzles.lines[i]}: {verdict}")
        print("\n".join(f"{a}   {b}" for a, b in zip(left, right, strict=True)), end="\n\n")
    if shown < len(solved.result.boards):
        note(f"({shown} of {len(solved.result.boards)} boards shown; --boards N shows more)")
