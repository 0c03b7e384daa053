"""Options of decoding that commands share: the order, how much a step reveals, and what may be drawn."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import torch

from loopmdm.data.tokenizer import Tokenizer
from loopmdm.plan import ComputePlan
from loopmdm.runs.options import UsageError, count, number, positive_int, usage_errors
from loopmdm.sampling import ORDERS, Decoding, Remasking
from loopmdm.sampling.orders import COUNTS
from loopmdm.sampling.remasking import DEFAULT_ETA

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def add_pace(parser: argparse.ArgumentParser, of: str = "") -> None:
    """How much a step reveals, beside --steps; of: what the heading of the options says before."""
    group = parser.add_argument_group(f"{of}pace", "how much a step reveals; one of these at most")
    group.add_argument("--tokens-per-step", type=positive_int, metavar="K", help="so many tokens")
    group.add_argument(
        "--threshold",
        type=number,
        metavar="P",
        help="what the order rates at least so high: probability, lead (margin), or nats at most (entropy)",
    )
    group.add_argument(
        "--entropy-bound",
        type=number,
        metavar="G",
        help="the best rated while entropies sum to G nats",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Every option of decoding that `sample` has."""
    parser.add_argument(
        "--order",
        choices=sorted(ORDERS),
        default="ancestral",
        help="which masks are filled next (default: %(default)s)",
    )
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="(default: %(default)s)")
    add_drawing(parser)


def add_drawing(parser: argparse.ArgumentParser, of: str = "") -> None:
    """The options of decoding but for order and seed; of: what the headings of the options say before."""
    parser.add_argument(
        "--steps", type=positive_int, metavar="T", help="denoising steps (default: one a token)"
    )
    parser.add_argument(
        "--counts",
        choices=COUNTS,
        default="even",
        help="which steps fill one more where T does not divide the tokens: spread evenly, or the first of a"
        " block, as in LLaDA's sampler (default: %(default)s)",
    )
    add_pace(parser, of)
    group = parser.add_argument_group(f"{of}where, and again")
    group.add_argument(
        "--block-length",
        type=positive_int,
        metavar="N",
        help="fill blocks of N tokens one after the other; needed for samples longer than the model reads",
    )
    group.add_argument(
        "--window", type=positive_int, metavar="N", help="fill among the N leftmost masks only"
    )
    group.add_argument("--remask", choices=sorted(DEFAULT_ETA), help="mask tokens again at times (ReMDM)")
    group.add_argument("--eta", type=number, metavar="E", help="how often (default: by the kind of --remask)")
    group = parser.add_argument_group(f"{of}what is drawn")
    group.add_argument(
        "--temperature", type=number, default=1.0, help="0 for the most probable (default: %(default)s)"
    )
    group.add_argument("--top-k", type=positive_int, metavar="K", help="the K most probable tokens only")
    group.add_argument(
        "--top-p", type=number, default=1.0, metavar="P", help="nucleus (default: %(default)s)"
    )
    group.add_argument(
        "--min-p",
        type=number,
        default=0.0,
        metavar="P",
        help="tokens at least P times as probable as the most probable one only",
    )
    group.add_argument(
        "--cfg-scale",
        type=number,
        default=0.0,
        metavar="W",
        help="classifier-free guidance: away from what the model predicts without the given tokens",
    )
    group.add_argument(
        "--forbid",
        dest="forbidden",
        type=_ids,
        metavar="ID,ID,...",
        help="token ids that are never drawn",
    )
    group.add_argument("--stop-at-eos", action="store_true", help="an end-of-text token ends its sample")
    group.add_argument(
        "--min-new-tokens", type=positive_int, metavar="N", help="no end among the first N tokens filled"
    )
    group.add_argument(
        "--reference-numerics",
        action="store_true",
        help="the reference's fp32 race, which loses rare tokens: to compare with figures made so",
    )


def decoding_of(args: argparse.Namespace, **others: Any) -> Decoding:
    """The decoding that a command line asks for: options have the names of its fields; `others` go before."""
    options = {field.name: getattr(args, field.name) for field in fields(Decoding) if field.name in args}
    with usage_errors():
        return Decoding(**(options | others))


def drawing_options() -> dict[str, tuple[str, Any]]:
    """The options of `add_drawing`: their names in a namespace, with the flag and the default of each."""
    parser = argparse.ArgumentParser(add_help=False)
    add_drawing(parser)
    flags = {"forbidden": "--forbid"}
    return {
        name: (flags.get(name, f"--{name.replace('_', '-')}"), default)
        for name, default in vars(parser.parse_args([])).items()
    }


def chosen_decoding(
    args: argparse.Namespace, tokenizer: Tokenizer | None, plan: ComputePlan, **others: Any
) -> Decoding:
    """What the options of `add_decoding` ask for; `others` go before."""
    if args.eta is not None and args.remask is None:
        raise UsageError("--eta: it belongs to --remask")
    if args.stop_at_eos and tokenizer is None:
        raise UsageError("--stop-at-eos: without a tokenizer no token is known to end a text (--tokenizer)")
    with usage_errors():
        remask = None if args.remask is None else Remasking(args.remask, args.eta)
    eos_token_id = tokenizer.eos_token_id if args.stop_at_eos and tokenizer is not None else None
    dtype = DTYPES[args.dtype or "fp32"]
    options = {"plan": plan, "remask": remask, "eos_token_id": eos_token_id, "dtype": dtype}
    return decoding_of(args, **(options | others))


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected token ids such as 5,17") from None
