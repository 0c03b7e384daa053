"""Options that say what a step computes: a compute plan, light and heavy, loops that stop by themselves."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from loopmdm.exits import ExitRule, make_rule
from loopmdm.model import LoopMDM
from loopmdm.model.loop_law import loop_count
from loopmdm.plan import ComputePlan, as_plan
from loopmdm.runs.models import load_model
from loopmdm.runs.options import UsageError, loop_errors, loop_range, num_loops, of_option, usage_errors
from loopmdm.terminal import note

CRITERIA = ("hidden", "output", "argmax")


def add_plan(parser: argparse.ArgumentParser, *names: str, default: str) -> None:
    """The options of a command that samples; names: of the plan's; default: what happens without it."""
    group = parser.add_argument_group("loops", "what a step computes")
    group.add_argument(
        *names,
        dest="plan",
        action=_Plan,
        metavar="PLAN",
        help=f"loops: a count such as 12, a schedule over the steps such as L125,H750,L125 or S2:50,S8:50,"
        f" fully masked end first, or a file with a saved plan (default: {default})",
    )
    parser.set_defaults(plan_option=names[0])
    add_looping(group)
    group.add_argument(
        "--light", metavar="L", help="what L in the plan stands for: a loop count or a model's folder"
    )
    group.add_argument(
        "--heavy", metavar="H", help="what H in the plan stands for: a loop count or a model's folder"
    )
    group.add_argument(
        "--adaptive",
        type=_threshold,
        metavar="EPS",
        help="a sequence stops looping when a loop changes it by less than EPS; the count of the plan is the"
        " most",
    )
    group.add_argument(
        "--min-loops",
        type=num_loops,
        metavar="S",
        help="stop after loop S at the earliest (default: 1)",
    )
    group.add_argument(
        "--criterion",
        choices=CRITERIA,
        help="what stops: hidden, the relative change of the hidden state (default); output, of the"
        " predictions, in nats; argmax, that no prediction's most probable token changed, which takes no"
        " EPS. The last two run the blocks behind the loop, and the vocabulary head, after every loop",
    )


class _Plan(argparse.Action):
    """The plan, and by which of its names it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.plan, namespace.plan_option = values, option_string


def add_looping(group: argparse._ArgumentGroup) -> None:
    """Options that loop a model otherwise than its configuration says."""
    group.add_argument(
        "--loop",
        type=loop_range,
        metavar="START:END",
        help="loop these blocks of MODEL, such as 1:3, in place of those it was trained with",
    )
    group.add_argument(
        "--damped",
        action="store_true",
        default=None,
        help="each of S loops of MODEL goes 1/S of its way: for a model that was trained without a loop",
    )


def looping(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the model's configuration that the options of `add_looping` replace."""
    fields = {} if args.loop is None else {"loop_start": args.loop[0], "loop_end": args.loop[1]}
    return fields if args.damped is None else {**fields, "damped": True}


def load_looped(args: argparse.Namespace, source: str, device: torch.device) -> LoopMDM:
    """The model of a command that has the options of `add_looping`.

    Raises:
        UsageError: it has no such blocks.
    """
    with loop_errors(args.loop):
        return load_model(source, device, **looping(args))


def looped_otherwise(args: argparse.Namespace) -> str:
    """What a line about the model says of them."""
    blocks = "" if args.loop is None else f", blocks {args.loop[0]} to {args.loop[1] - 1} looped"
    return blocks if args.damped is None else f"{blocks}, damped loops"


def adapts(args: argparse.Namespace) -> bool:
    """Whether loops are asked to stop by themselves."""
    if args.adaptive is None and args.criterion is not None and args.criterion != "argmax":
        raise UsageError(f"--criterion {args.criterion}: it needs a threshold, give one with --adaptive EPS")
    if args.adaptive is not None and args.criterion == "argmax":
        raise UsageError("--adaptive: the criterion argmax has no threshold")
    wanted = args.adaptive is not None or args.criterion is not None
    if args.min_loops is not None and not wanted:
        raise UsageError("--min-loops: it belongs to --adaptive EPS or --criterion argmax")
    return wanted


def plan_option(args: argparse.Namespace, device: torch.device) -> ComputePlan:
    """The plan that the options of `add_plan` ask for."""
    text, option = args.plan, args.plan_option
    if adapts(args):
        if text is not None and not text.isdecimal():
            raise UsageError(f"{option}: with --adaptive it is the most loops, a count, got {text!r}")
        return adaptive(args, None if text is None else _loops_of(option, text))
    if text is None or text.isdecimal():
        if args.light is not None or args.heavy is not None:
            raise UsageError(
                "--light, --heavy: they belong to a plan such as L125,H750,L125, give one with --plan"
            )
        return as_plan(None if text is None else _loops_of(option, text))
    light, heavy = (_choice(f"--{name}", getattr(args, name), device) for name in ("light", "heavy"))
    with usage_errors(option):
        if Path(text).is_file():
            models = {"L": light, "H": heavy}
            try:
                return ComputePlan.load(text, {n: m for n, m in models.items() if isinstance(m, LoopMDM)})
            except OSError as error:
                raise UsageError(f"{option}: cannot read {text}: {error.strerror}") from error
        return ComputePlan.parse(text, light, heavy)


def adaptive(args: argparse.Namespace, max_loops: int | None) -> ComputePlan:
    """The adaptive plan of at most so many loops."""
    if args.light is not None or args.heavy is not None:
        raise UsageError("--light, --heavy: they do not go with --adaptive")
    with usage_errors():
        return ComputePlan.adaptive(None, max_loops, args.min_loops or 1, exit_rule(args))


def exit_rule(args: argparse.Namespace) -> ExitRule:
    """The rule that --adaptive and --criterion ask for."""
    with usage_errors():
        return make_rule(args.criterion or "hidden", args.adaptive)


def note_beyond_training(model: LoopMDM, plans: Iterable[ComputePlan]) -> None:
    """Say so where a plan runs more loops than a model was trained with."""
    beyond: dict[int, int] = {}
    for plan in plans:
        for compute in plan.computes:
            trained = (model if compute.model is None else compute.model).config.max_loops
            if (compute.num_loops or 0) > trained:
                beyond[trained] = max(beyond.get(trained, 0), compute.num_loops or 0)
    for trained, most in beyond.items():
        note(f"note: S = {most} is beyond the S = {trained} of training: it runs, and may do better or worse")


def _loops_of(option: str, text: str) -> int:
    """The value of an option that is a count alone."""
    with usage_errors(option):
        return loop_count("loops", int(text))


def _choice(option: str, text: str | None, device: torch.device) -> int | LoopMDM | None:
    if text is None or text.isdecimal():
        return None if text is None else _loops_of(option, text)
    with of_option(option):
        return load_model(text, device)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or value < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least 0, or inf")
    return value
