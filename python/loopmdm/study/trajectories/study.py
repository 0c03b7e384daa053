"""What single tokens become while the loop runs: prediction and -log p(truth) after k = 1..K loops.

LoopMDM, Fig. 8. The masked positions of one sequence are decoded from after(H(k)) for every k of one forward
pass; the states are those of separate runs with k loops, bit for bit, which the study checks. Shown are the
positions whose -log p(truth) changes most over the loops, in either direction, or those of --positions. The
shares over all sequences say how typical they are: tokens that become right, become wrong, or stay.

For text, --t is the share of masked tokens; for Sudoku, the share of masked blanks (default: all).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loopmdm.model import LoopMDM
from loopmdm.quality.bootstrap import Bootstrap
from loopmdm.runs.options import UsageError, count, positive_int
from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import Row, StudyFolder
from loopmdm.study.kit.inputs import Noisy, at_times, masked_log_probs, times
from loopmdm.study.kit.sources import HeldOut, add_data, add_whole_boards, held_out, load_denoisers
from loopmdm.study.trajectories import CONTEXT
from loopmdm.view.symbols import MASK_TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "predictions of single tokens over the loops"
EPILOG = """examples:
  loopmdm study trajectories run --sequence 3 --t 0.4 --out trajectories
  loopmdm study trajectories sudoku6 --loops 12 --out trajectories-sudoku
"""
KINDS = ("stays right", "becomes right", "becomes wrong", "stays wrong")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or shipped model")
    parser.add_argument(
        "--loops",
        type=positive_int,
        metavar="K",
        help="loops to follow (default: twice the model's max_loops)",
    )
    parser.add_argument(
        "--t", type=one_time, metavar="T", help="time in (0, 1] (default: 0.5; Sudoku: 1, all blanks)"
    )
    parser.add_argument(
        "--sequence", type=count, default=0, metavar="N", help="which sequence to show (default: %(default)s)"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--show",
        type=positive_int,
        default=20,
        metavar="N",
        help="tokens to show, those that change most (default: %(default)s)",
    )
    chosen.add_argument("--positions", type=positions, metavar="P,P,...", help="masked positions to show")
    add_whole_boards(parser)
    add_data(parser, windows=64)


def one_time(text: str) -> float:
    """An option's time in (0, 1]."""
    values = times(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one time")
    return values[0]


def positions(text: str) -> list[int]:
    """An option's positions, counted from 0."""
    return sorted({count(part) for part in text.split(",")})


@torch.no_grad()
def trajectories(model: LoopMDM, noisy: Noisy, most: int) -> list[tuple[Tensor, Tensor]]:
    """For each sequence, predictions and -log p(truth) [K, R] of its masked positions after 1..K loops."""
    stages = noisy.stages(model)
    state = stages.before()
    steps = []
    for loop in range(most):
        state = stages.loop(state, done=loop)
        steps.append(_decoded(model, stages.after(state), noisy))
    return [
        (torch.stack([tokens for tokens, _ in one]), torch.stack([nll for _, nll in one]))
        for one in zip(*steps, strict=True)
    ]


def _decoded(model: LoopMDM, hidden: Tensor, noisy: Noisy) -> list[tuple[Tensor, Tensor]]:
    result = []
    for index, log_probs in enumerate(masked_log_probs(model, hidden, noisy)):
        truth = noisy.clean[index, noisy.masked[index]].to(hidden.device)
        nll = -log_probs.gather(1, truth[:, None])[:, 0]
        result.append((log_probs.argmax(-1).cpu(), nll.cpu()))
    return result


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    (denoiser,) = load_denoisers(args, folder, [args.model])
    model = denoiser.model
    data = held_out(args, folder, denoiser)
    if args.sequence >= data.num_sequences:
        raise UsageError(f"--sequence: got {args.sequence}, there are {data.num_sequences} (--windows)")
    t = args.t or (0.5 if data.spec is None else 1.0)
    most = args.loops or 2 * model.config.max_loops
    starts = [0, *accumulate(len(batch.input_ids) for batch in data.batches)]

    def corrupted(number: int) -> Noisy:
        return at_times(data.batches[number], [t], args.seed, starts[number])[0]

    def measure(key: str) -> dict[str, Any]:
        noisy = corrupted(int(key.split()[1]))
        followed = trajectories(model, noisy, most)
        correct = [
            (tokens == noisy.clean[i, noisy.masked[i]]).double() for i, (tokens, _) in enumerate(followed)
        ]
        return {
            "masked": noisy.masked.sum(1).tolist(),
            "correct": [c.sum(1).tolist() for c in correct],
            "nll": [nll.sum(1).tolist() for _, nll in followed],
            "kinds": [_kinds(c) for c in correct],
        }

    number = next(i for i, start in enumerate(starts[1:]) if args.sequence < start)
    noisy, row = corrupted(number), args.sequence - starts[number]
    masked = noisy.masked[row].nonzero().flatten().tolist()
    if missing := sorted(set(args.positions or ()) - set(masked)):
        raise UsageError(f"--positions: {missing} are not masked; masked are {masked}")
    parts = folder.items([f"batch {i}" for i in range(len(data.batches))], measure, "batches")
    (one,) = folder.items(
        [f"sequence {args.sequence}"], lambda _: _followed(model, noisy, row, most), "sequences"
    )
    folder.facts |= {"t": t, "loops": most, "sequence": args.sequence, "network_calls": data.num_sequences}
    folder.find(
        "L15",
        "predictions and -log p of the shown sequence equal those of separate runs with S = 1..K",
        f"{most} runs, {len(one['positions'])} positions, largest difference {one['difference']:g}",
        one["difference"] == 0 and one["same_tokens"],
    )
    return [
        *_summary(parts, most, args.seed),
        *_tokens(args, data, one, noisy, row),
    ]


def _kinds(correct: Tensor) -> list[int]:
    """How many of the positions [K, R] are of each of KINDS, from the first loop to the last."""
    first, last = correct[0].bool(), correct[-1].bool()
    return [int(kind.sum()) for kind in (first & last, ~first & last, first & ~last, ~first & ~last)]


def _followed(model: LoopMDM, noisy: Noisy, row: int, most: int) -> dict[str, Any]:
    """The trajectory of one sequence beside `most` separate runs of the whole network."""
    tokens, nll = trajectories(model, noisy, most)[row]
    stages = noisy.stages(model)
    separate = [
        _decoded(
            model,
            model.hidden(stages.tokens, noisy.sigma(model), num_loops=k, attention_mask=noisy.keys(model)),
            noisy,
        )[row]
        for k in range(1, most + 1)
    ]
    return {
        "positions": noisy.masked[row].nonzero().flatten().tolist(),
        "tokens": tokens.tolist(),
        "nll": nll.tolist(),
        "difference": max(float((a - b).abs().max()) for (_, a), b in zip(separate, nll, strict=True)),
        "same_tokens": all(torch.equal(a, b) for (a, _), b in zip(separate, tokens, strict=True)),
    }


def _summary(parts: Sequence[dict[str, Any]], most: int, seed: int) -> list[Row]:
    masked, correct, nll, kinds = (
        np.array([one for part in parts for one in part[name]])
        for name in ("masked", "correct", "nll", "kinds")
    )
    bootstrap = Bootstrap(len(masked), seed=seed)
    counts = np.broadcast_to(masked[:, None], correct.shape)
    estimates = {
        name + since: bootstrap.ratio(values - values[:, :1] if since else values, counts)
        for name, values in (("right", correct), ("nll", nll))
        for since in ("", "_since_1")
    }
    rows: list[Row] = []
    for k in range(most):
        rows.append({"part": "all tokens", "k": k + 1})
        for name, estimate in estimates.items():
            for end, values in zip(("", "_low", "_high"), estimate, strict=True):
                rows[-1][name + end] = float(values[k])
    shares = bootstrap.ratio(kinds, np.broadcast_to(masked[:, None], kinds.shape))
    rows += [
        {
            "part": "kinds",
            "kind": kind,
            **{f"share{e}": float(v[i]) for e, v in zip(("", "_low", "_high"), shares, strict=True)},
        }
        for i, kind in enumerate(KINDS)
    ]
    return rows


def _tokens(
    args: argparse.Namespace, data: HeldOut, one: dict[str, Any], noisy: Noisy, row: int
) -> list[Row]:
    """Rows of the shown positions; for boards, of all cells."""
    clean, masked = noisy.clean[row].tolist(), noisy.masked[row].tolist()
    nll = np.array(one["nll"])
    if args.positions is not None:
        shown = [one["positions"].index(p) for p in args.positions]
    else:
        change = nll.max(0) - nll.min(0)
        most = len(change) if data.spec is not None else args.show
        shown = sorted(np.argsort(-change, kind="stable")[:most].tolist())
    symbols = data.symbols
    text = symbols.pieces(clean, mask_token_id=-1)
    seen = [MASK_TEXT if hidden else piece for piece, hidden in zip(text, masked, strict=True)]
    rows: list[Row] = []
    if data.spec is not None:
        rows += [
            {"part": "clues", "position": p, "truth": text[p]}
            for p, hidden in enumerate(masked)
            if not hidden
        ]
    for i in shown:
        p = one["positions"][i]
        before, after = seen[max(0, p - CONTEXT) : p], seen[p + 1 : p + 1 + CONTEXT]
        for k, (tokens, losses) in enumerate(zip(one["tokens"], one["nll"], strict=True), start=1):
            (piece,) = symbols.pieces([tokens[i]], mask_token_id=-1)
            rows.append(
                {
                    "part": "tokens" if data.spec is None else "cells",
                    "position": p,
                    "k": k,
                    "before": "".join(before),
                    "after": "".join(after),
                    "truth": text[p],
                    "prediction": piece,
                    "right": tokens[i] == clean[p],
                    "nll": losses[i],
                }
            )
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    from loopmdm.study.trajectories.figures import draw_boards, draw_summary, draw_tokens  # with matplotlib

    cells = figures.select(rows, part="cells")
    tokens = figures.select(rows, part="tokens")
    summary = figures.select(rows, part="all tokens")
    if cells:
        figure, left, right = draw_boards(cells, figures.select(rows, part="clues"))
    else:
        figure, left, right = draw_tokens(tokens)
    draw_summary(left, right, summary, figures.select(rows, part="kinds"))
    return figure
