"""Measure a model at several loop counts.

Text: the likelihood (NELBO) of held-out text, in nats per token, perplexity and bits per byte, each with its
standard error over windows. Sudoku: the share of held-out puzzles solved in each decoding order, and the
NELBO of their blanks. Times, masks and puzzles are the same for every loop count and every model. The NELBO
is a bound; --method chain_rule gives the exact likelihood in an order, and reads a text once for each token.

With --samples a model of text is measured by what it writes, in any order and with any plan: generative
perplexity and bits per byte under an autoregressive scorer, unigram entropy, distinct n-grams, self-BLEU and
MAUVE, beside those of held-out text. Below a table stands what each row was computed with.
"""

from __future__ import annotations

import argparse
from typing import Any

from loopmdm.cli import eval_samples, samples_table
from loopmdm.cli.output import print_json, print_table, show
from loopmdm.cli.parser import add_json, add_runtime, set_up
from loopmdm.cli.plans import (
    adaptive,
    adapts,
    exit_rule,
    load_looped,
    looped_otherwise,
    looping,
    note_beyond_training,
)
from loopmdm.data.sudoku import SudokuSpec, count_solutions, solve
from loopmdm.model import LoopMDM
from loopmdm.plan import ComputePlan
from loopmdm.quality.copies import METHODS, checked_samples
from loopmdm.quality.copies import ORDERS as CHAIN_ORDERS
from loopmdm.quality.cost import cost_line
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.runs import likelihood, text_data
from loopmdm.runs.boards import (
    HELD_OUT_SEED,
    ORDERS,
    SHARE_COLUMNS,
    blanks,
    given_puzzles,
    greedy,
    held_out_puzzles,
    not_counted,
    share_row,
    solve_all,
)
from loopmdm.runs.held_out import add_text_options, held_out_text
from loopmdm.runs.models import default_loops, sudoku_spec
from loopmdm.runs.options import UsageError, count, loop_counts, positive_int, usage_errors
from loopmdm.sampling import ORDERS as SAMPLING_ORDERS
from loopmdm.terminal import note

EPILOG = """examples:
  loopmdm eval run                                  a run of `loopmdm train`, on the documents it held out
  loopmdm eval run --data other.txt --loops 1,2,4,8 --num-t 32
  loopmdm eval run --adaptive 0.1                   loops that stop by themselves
  loopmdm eval run --method chain_rule --windows 8  exact, token by token from left to right
  loopmdm eval run --samples 64 --scorer scorer --steps 64 --loops 1,4
  loopmdm eval run --samples 64 --order confidence --plan L16,H48 --light 1 --heavy 4 --temperature 0.8
  loopmdm eval run --samples 64 --loops 4 --save-samples samples.json
  loopmdm eval run --from-samples samples.json --scorer scorer --mauve scorer
  loopmdm eval sudoku9 --num 200 --json
"""
# Options about the other kind of model, with their defaults.
_OF_SUDOKU = {"num": 100}
_OF_TEXT = dict.fromkeys(("part", "length", "tokenizer")) | {
    "windows": 64,
    "text_field": "text",
    "errors": "strict",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or a shipped model: sudoku9, sudoku6")
    parser.add_argument(
        "--loops",
        type=loop_counts,
        metavar="S,S,...",
        help="loop counts (default: 1, half and all of the model's most; with --adaptive, the most alone)",
    )
    parser.add_argument(
        "--num-t", type=positive_int, default=16, help="times per sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="stratified",
        help="the NELBO, with times in equal parts of their range (stratified) or anywhere (mc), or the exact"
        " chain rule (default: %(default)s)",
    )
    parser.add_argument(
        "--chain-order",
        choices=CHAIN_ORDERS,
        help="of the chain rule (default: left_to_right); random takes --num-t orders per sequence",
    )
    parser.add_argument("--seed", type=count, default=0, help="of all that is drawn (default: %(default)s)")
    text = parser.add_argument_group("text")
    add_text_options(text, windows=64)
    puzzles = parser.add_argument_group("Sudoku")
    puzzles.add_argument(
        "--puzzles", metavar="FILE", help="as in `loopmdm solve` (default: made here, test split)"
    )
    puzzles.add_argument(
        "--num", type=positive_int, default=100, metavar="N", help="puzzles (default: %(default)s)"
    )
    parser.add_argument(
        "--order",
        choices=[*sorted(SAMPLING_ORDERS), "both"],
        help="of decoding: Sudoku, left_to_right, confidence or both (default); samples, any (default:"
        " ancestral)",
    )
    eval_samples.add_arguments(parser)
    add_json(parser, "the figures")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    device = set_up(args)
    model = load_looped(args, args.model, device)
    spec = sudoku_spec(model)
    adaptive_loops = not eval_samples.wanted(args) and adapts(args)
    loops = args.loops or ([model.config.max_loops] if adaptive_loops else default_loops(model))
    if spec is not None and args.data is not None:
        raise UsageError(f"--data: {args.model} solves {spec} Sudoku; give --puzzles FILE")
    if spec is None and args.puzzles is not None:
        raise UsageError(f"--puzzles: {args.model} is a model of text; give --data PATH")
    for name, default in (_OF_TEXT if spec is not None else _OF_SUDOKU).items():
        if getattr(args, name) != default:
            kind = "a model of text" if spec is None else f"one of {spec} Sudoku"
            raise UsageError(f"--{name.replace('_', '-')}: {args.model} is {kind}, to which it means nothing")
    eval_samples.check(args, text=spec is None)
    if spec is None and args.order is not None and not eval_samples.wanted(args):
        raise UsageError("--order: it belongs to --samples N")
    if spec is not None and args.order not in (None, "both", *ORDERS):
        raise UsageError(f"--order: got {args.order}; of Sudoku, expected {', '.join(ORDERS)} or both")
    if eval_samples.wanted(args):
        return _samples(args, model, loops)
    with usage_errors():
        checked_samples(args.method, args.chain_order, None)
        note_beyond_training(model, map(ComputePlan.constant, loops))
    document = _text(args, model, loops) if spec is None else _sudoku(args, model, spec, loops)
    if args.json:
        print_json({"model": args.model, **looping(args), **document})
        return 0
    show(f"model {args.model}{looped_otherwise(args)}, {document['source']}\n")
    if "solved" in document:
        print_table(SHARE_COLUMNS, [share_row(one) for one in document["solved"]])
        show("\n" + "\n".join(f"{one['order']}, {cost_line(one['cost'])}" for one in document["solved"]))
        if not document["held_out"]:
            return 0
        print(f"\n{'NLL' if args.method == 'chain_rule' else 'NELBO'} of the blanks, given the clues:")
    print_table(likelihood.columns(document["held_out"]), likelihood.rows(document["held_out"]))
    show("\n" + "\n".join(cost_line(one["cost"]) for one in document["held_out"]))
    return 0


def _samples(args: argparse.Namespace, model: LoopMDM, loops: list[int]) -> int:
    document = eval_samples.measure(args, model, loops)
    if args.json:
        print_json({"model": args.model, **looping(args), **document})
        return 0
    show(f"model {args.model}{looped_otherwise(args)}\n")
    print_table(samples_table.columns(document), samples_table.table(document))
    show("\n" + samples_table.describe(document))
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `evaluate_nll`: what is estimated, and what ends loops early."""
    options = {"num_t": args.num_t, "seed": args.seed, "method": args.method, "order": args.chain_order}
    if adapts(args):
        options |= {"exit": exit_rule(args), "min_loops": args.min_loops or 1}
    return options


def _text(args: argparse.Namespace, model: LoopMDM, loops: list[int]) -> dict[str, Any]:
    text = held_out_text(args, model, args.model)
    windows = text_data.windows(text.data, text.tokenizer, args.windows)
    each = f"{args.num_t} times each for"
    if args.method == "chain_rule":
        each = f"{args.num_t} orders of each token of" if args.chain_order == "random" else "each token of"
    note(f"{each} {min(args.windows, len(text.data))} windows of {text.length} tokens")
    results = evaluate_nll(
        model,
        windows.batches,
        num_loops=loops,
        bytes_per_token=windows.bytes_per_token,
        **_options(args),
    )
    return {
        "source": text.description,
        "data": text.source,
        "part": text.part,
        "length": text.length,
        "held_out": [likelihood.to_dict(result) for result in results],
    }


def _sudoku(args: argparse.Namespace, model: LoopMDM, spec: SudokuSpec, loops: list[int]) -> dict[str, Any]:
    threads = args.threads or 1
    if args.puzzles is None:
        clues, solutions, _, _ = held_out_puzzles(spec, args.num, threads)
        source = f"{args.num} held-out {spec} puzzles made here"
    else:
        file = given_puzzles(args.puzzles, spec)
        counts = count_solutions(spec, file.clues[: args.num], threads=threads)
        for line in not_counted(file, counts):
            note(line)
        clues = file.clues[: args.num][counts == 1]
        if not len(clues):
            raise ValueError(f"{args.puzzles}: no puzzle with exactly one solution")
        solutions = solve(spec, clues, threads=threads)
        source = f"{len(clues)} {spec} puzzles of {args.puzzles}"
    orders = ORDERS if args.order in (None, "both") else (args.order,)
    plans = [adaptive(args, most) if adapts(args) else ComputePlan.constant(most) for most in loops]
    seeds = {"puzzles": HELD_OUT_SEED} if args.puzzles is None else {}
    solved = solve_all(model, spec, clues, greedy(orders, plans), progress=True, seeds=seeds)
    batches = blanks(clues, solutions)
    results = []
    if batches:
        results = evaluate_nll(model, batches, num_loops=loops, **_options(args))
    else:
        note("no puzzle has a blank, so there is no likelihood to measure")
    return {
        "source": source,
        "size": str(spec),
        "puzzles": len(clues),
        "solved": [one.to_dict() for one in solved],
        "held_out": [likelihood.to_dict(result) for result in results],
    }
