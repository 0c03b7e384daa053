"""Find out which kernels are right on this machine and faster than plain PyTorch, to be used from then on.

Each backend, op, direction and dtype is tried in a process of its own with a time limit: values and gradients
against float64 by the common rule, edges, and the same bits 50 times, in a fresh thread, on two streams and
in a CUDA graph. What is right is timed beside plain PyTorch. The verdict is kept in $LOOPMDM_CACHE_DIR
(default ~/.cache/loopmdm_kernels) until package, torch, Triton or driver change. Without one, calls on a GPU
use plain PyTorch; LOOPMDM_QUALIFY=0 leaves verdicts out.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping
from typing import Any

from loopmdm.cli.output import print_json, print_table
from loopmdm.cli.parser import FAILED, add_json, add_runtime, set_up
from loopmdm.runs.options import UsageError
from loopmdm.terminal import note

EPILOG = """examples:
  loopmdm qualify
  loopmdm qualify --device cpu --op sample_rows --no-compiled
"""
_BACKENDS = ("cpu", "triton", "cuda")
_OPS = ("looped_blocks", "attention", "head_logits", "masked_cross_entropy", "sample_rows")
_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option, names in (("--backend", _BACKENDS), ("--op", _OPS), ("--dtype", _DTYPES)):
        listed = f"only this one (several: give it again; default all): {', '.join(names)}"
        parser.add_argument(option, choices=names, action="append", metavar="NAME", help=listed)
    parser.add_argument(
        "--no-compiled", action="store_true", help="do not time compiled PyTorch, for comparison"
    )
    parser.add_argument(
        "--if-needed", action="store_true", help="do nothing where a valid verdict answers it all"
    )
    parser.add_argument(
        "--time-limit", type=_seconds, default=120.0, metavar="SECONDS", help="for each part (default 120)"
    )
    add_json(parser, "the verdict")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    """Status 1 where a backend is wrong."""
    import loopmdm_kernels as lk

    device = set_up(args)
    try:
        verdict = lk.qualify(
            device,
            backends=args.backend,
            ops=args.op,
            dtypes=args.dtype or _DTYPES,
            compiled=not args.no_compiled,
            time_limit=args.time_limit,
            anew=not args.if_needed,
            on_progress=note,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.json:
        print_json(verdict)
    else:
        rows = [_row(entry) for entry in verdict["entries"]]
        print_table(
            ("op", "direction", "dtype", "backend", "right", "ratio", "compiled", ""), rows, align="left"
        )
        print(f"\n{verdict['machine']['device']}: {verdict['path']}")
    return FAILED if any(entry["right"] is False for entry in verdict["entries"]) else 0


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    right = {True: "yes", False: "no", None: "-"}[entry["right"]]
    ratios = [
        times["compiled"] / times["ours"]
        for times in entry["seconds"].values()
        if {"compiled", "ours"} <= {*times}
    ]
    return (
        *(entry[name] for name in ("op", "direction", "dtype", "backend")),
        right,
        "" if entry["speedup"] is None else f"{entry['speedup']:.2f}",
        f"{ratios[-1]:.2f}" if ratios else "",
        entry["why"] or "",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of seconds, more than 0")
    return value
