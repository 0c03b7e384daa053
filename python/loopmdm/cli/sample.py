"""Write text with a trained model, from nothing, from a prompt, or into the gaps of a text.

Every sequence begins as masks, which are filled in over a number of denoising steps. A compute plan says how
many loops the model runs at which step. The same seed gives the same samples. A model of Sudoku gives boards
made from nothing (`loopmdm solve` fills in puzzles).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopmdm.cli.decoding import DTYPES, add_decoding, chosen_decoding
from loopmdm.cli.output import has_color, print_json
from loopmdm.cli.parser import add_json, add_runtime, set_up
from loopmdm.cli.plans import (
    add_plan,
    load_looped,
    looped_otherwise,
    looping,
    note_beyond_training,
    plan_option,
)
from loopmdm.cli.views import PainterOf, Views, add_views
from loopmdm.data.sudoku import SudokuSpec, encode_boards, format_board, is_valid_solution
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.runs.models import load_tokenizer, sudoku_spec
from loopmdm.runs.options import UsageError, positive_int, usage_errors
from loopmdm.runs.run_file import RunFile
from loopmdm.sampling import Decoding, SampleResult
from loopmdm.sampling.canvas import make_canvas
from loopmdm.sampling.sampler import sample_with
from loopmdm.terminal import note
from loopmdm.view import BoardSymbols, IdSymbols, Symbols, TextSymbols
from loopmdm.view.painters import BoardPainter, TextPainter
from loopmdm.view.symbols import printable

EPILOG = """examples:
  loopmdm sample run --num 4 --seed 1
  loopmdm sample run --prompt "def main(" --length 128 --plan 8 --temperature 0.8
  loopmdm sample run --infill "import ________ as np" --order confidence
  loopmdm sample run --order entropy --entropy-bound 0.5 --block-length 32 --stop-at-eos
  loopmdm sample run --steps 1000 --plan L125,H750,L125 --light 2 --heavy 12
  loopmdm sample run --order confidence --plan 12 --adaptive 0.1
  loopmdm sample run --prompt "def main(" --watch --html run.html
"""
_GAP = re.compile(r"\[MASK\]|_{3,}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument(
        "--num", type=positive_int, default=4, metavar="N", help="samples (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=positive_int, metavar="L", help="tokens (default: the length of training)"
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="the samples begin with it")
    given.add_argument(
        "--infill",
        metavar="TEXT",
        help="fill the gaps of this text: [MASK] is one token, ___ (3 or more) one token each",
    )
    add_plan(parser, "--plan", "--loops", default="the model's most")
    add_decoding(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of matrix products (default: %(default)s)"
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="launch a step as one CUDA graph: on a GPU, with LOOPMDM_BACKEND=triton or cuda,triton"
        " (experimental)",
    )
    parser.add_argument(
        "--tokenizer", metavar="T", help="folder, file or hub id (default: the one beside the model)"
    )
    add_json(parser, "samples, token ids and costs")
    add_views(parser, sequences="samples", html_loops=16)
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    views = Views(args)
    device = set_up(args)
    model = load_looped(args, args.model, device)
    tokenizer = load_tokenizer(model, args.model, args.tokenizer)
    spec = sudoku_spec(model) if tokenizer is None else None
    if tokenizer is None and spec is None:
        note(f"{args.model} holds no tokenizer: prompts and samples are token ids (--tokenizer gives one)")
    if spec is not None and (args.prompt is not None or args.infill is not None):
        note("prompts of a Sudoku model are token ids: a digit less one")
    with usage_errors():
        plan = plan_option(args, device)
    decoding = chosen_decoding(args, tokenizer, plan)
    note_beyond_training(model, [plan])
    run = RunFile.read(Path(args.model))
    length = args.length or (run.length if run is not None and run.length else model.config.max_length)
    start: dict[str, Any] = {"length": length}
    if args.prompt is not None:
        prompt = start["prompt"] = _ids(args.prompt, tokenizer, "--prompt")
        if len(prompt) > length:
            raise UsageError(f"--prompt: it is {len(prompt)} tokens long, beyond the {length} of a sample")
    if args.infill is not None:
        start = {"infill": _canvas(args.infill, tokenizer, model), "length": args.length}
    sampler = partial(sample_with, model, decoding, args.num, **start)
    with usage_errors():
        if views.wanted:
            result = _shown(args, views, model, tokenizer, decoding, start, sampler)
        else:
            result = sampler()
    if result.tokens.shape[1] != model.config.max_length:
        spec = None
    ids = [row[:size] for row, size in zip(result.tokens.tolist(), result.lengths.tolist(), strict=True)]
    texts = [None if tokenizer is None else tokenizer.decode(row) for row in ids]
    if args.json:
        print_json(
            {
                "model": args.model,
                **looping(args),
                "length": result.tokens.shape[1],
                "steps": result.num_steps,
                "order": args.order,
                "plan": str(plan),
                "plan_json": json.loads(plan.to_json()),
                "ledger": result.ledger.report(),
                "seed": args.seed,
                "exact": result.exact,
                "seconds": result.seconds,
                "network_calls": result.network_calls.tolist(),
                "loops": result.loops.tolist(),
                "rows_projected": result.rows_projected,
                "backends": result.backends,
                "samples": [
                    {"text": text, "ids": row, **_board(spec, row)}
                    for text, row in zip(texts, ids, strict=True)
                ],
            }
        )
        return views.status
    for index, (text, row) in enumerate(zip(texts, ids, strict=True), start=1):
        if spec is not None:
            verdict = "a valid board" if _board(spec, row)["valid"] else "no valid board"
            print(f"--- sample {index} of {len(ids)}: {verdict} ---")
            print(format_board(spec, np.array(row) + 1, color=has_color()))
            continue
        print(f"--- sample {index} of {len(ids)} ---")
        print(" ".join(map(str, row)) if text is None else printable(text))
    note(
        f"{result.seconds:.1f} s, {result.total_network_calls} network calls,"
        f" {int(result.loops.sum())} loops, plan {plan}{looped_otherwise(args)}"
    )
    return views.status


def _board(spec: SudokuSpec | None, row: list[int]) -> dict[str, Any]:
    """What a board's tokens are beside ids; nothing of a text's."""
    if spec is None:
        return {}
    cells = np.array(row)[None] + 1
    return {"board": encode_boards(spec, cells)[0], "valid": bool(is_valid_solution(spec, cells)[0])}


def _shown(
    args: argparse.Namespace,
    views: Views,
    model: LoopMDM,
    tokenizer: Tokenizer | None,
    decoding: Decoding,
    start: dict[str, Any],
    sampler: Callable[..., SampleResult],
) -> SampleResult:
    """Sample, with the views that the options ask for."""
    given = {"length": None, "prompt": None, "infill": None} | start
    canvas = make_canvas(model.config, args.num, **given, block_length=decoding.block_length).tokens
    symbols: Symbols = IdSymbols() if tokenizer is None else TextSymbols(tokenizer)
    painter: PainterOf = partial(TextPainter, symbols)
    spec = sudoku_spec(model)
    if tokenizer is None and spec is not None and canvas.shape[1] == spec.cells:
        board = BoardSymbols(spec)
        symbols, painter = board, partial(BoardPainter, board)
    return views.run(
        sampler,
        model,
        canvas,
        decoding,
        symbols,
        painter,
        titles=[f"sample {index + 1}" for index in range(len(canvas))],
        title=f"Samples of {args.model}",
        facts={"model": args.model, "order": decoding.order, "seed": str(decoding.seed)},
    )


def _ids(text: str, tokenizer: Tokenizer | None, option: str) -> list[int]:
    """Ids a sequence begins with: BOS and the text; without a tokenizer, the ids that are written there."""
    if tokenizer is not None:
        with usage_errors(option):
            ids: list[int] = tokenizer.encode(text).tolist()
        return [tokenizer.bos_token_id, *ids]
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise UsageError(
            f"{option}: without a tokenizer, expected ids such as '5 17 3', got {text!r}"
        ) from None


def _canvas(text: str, tokenizer: Tokenizer | None, model: LoopMDM) -> torch.Tensor:
    """BOS text EOS as ids [L], the mask at every gap."""
    gaps = list(_GAP.finditer(text))
    if not gaps:
        raise UsageError(f"--infill: no gap in {text!r}; write [MASK] or ___ where text is to be filled in")
    mask = model.config.mask_token_id
    ids: list[int] = []
    end = 0
    for gap in gaps:
        ids += _piece(text[end : gap.start()], tokenizer)
        ids += [mask] * (1 if gap[0] == "[MASK]" else len(gap[0]))
        end = gap.end()
    ids += _piece(text[end:], tokenizer)
    if tokenizer is not None:
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def _piece(text: str, tokenizer: Tokenizer | None) -> list[int]:
    return _ids(text, tokenizer, "--infill")[0 if tokenizer is None else 1 :] if text else []
