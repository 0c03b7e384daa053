"""What the studies that train have in common: options, arms of one budget, their evaluation, one figure.

Sudoku arms are judged by boards solved in each decoding order, text arms by the NELBO of held-out windows;
both at several loop counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loopmdm.data.corpus import CorpusData
from loopmdm.data.sudoku.clues import parse_clues
from loopmdm.model import flops
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.loop_law import LoopLaw
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.runs import text_data
from loopmdm.runs.boards import ORDERS, held_out_puzzles
from loopmdm.runs.jobs import PRESETS, held_out_of, read_corpus
from loopmdm.runs.options import (
    Sources,
    UsageError,
    count,
    loop_counts,
    loop_range,
    num_loops,
    number,
    positive_float,
    positive_int,
    usage_errors,
)
from loopmdm.runs.recipes import SUDOKU_RECIPES, TEXT_RECIPES
from loopmdm.runs.run_file import VALIDATION, RunFile
from loopmdm.runs.text_data import located
from loopmdm.solve import solve_puzzles
from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.training.arms import Arm, Budget, TrainedArm, train_arm
from loopmdm.study.training.binomial import wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
MakeArms = Callable[[LoopMDMConfig, LoopLaw], list[Arm]]
_Z = 1.96  # of a 95 % interval


def seeds(text: str) -> list[int]:
    """Seeds such as "0,1", each once."""
    return list(dict.fromkeys(count(part) for part in text.split(",")))


def add_arguments(parser: argparse.ArgumentParser, *, default_flops: float) -> None:
    what = parser.add_argument_group("what to train (options left out are the preset's)")
    what.add_argument(
        "--preset",
        choices=PRESETS,
        default="sudoku6",
        help="as in `loopmdm train` (default: %(default)s)",
    )
    what.add_argument(
        "--data",
        nargs="+",
        action=Sources,
        metavar="PATH",
        help="text or corpora, as in `loopmdm train`; goes with a text preset",
    )
    what.add_argument(
        "--clues", metavar="C", help="given cells of boards, as in `loopmdm train`; also of those to solve"
    )
    what.add_argument(
        "--arms", nargs="+", metavar="NAME", help="these alone (default: all that the study names)"
    )
    what.add_argument(
        "--tokenizer", default="byte", metavar="T", help="byte (default), bpe:VOCAB or a folder"
    )
    what.add_argument("--length", type=positive_int, metavar="L", help="tokens of a sequence of text")
    what.add_argument(
        "--validation", type=number, default=VALIDATION, metavar="SHARE", help="documents held out"
    )
    what.add_argument("--hidden", dest="hidden_size", type=positive_int, metavar="D", help="hidden size")
    what.add_argument("--layers", dest="num_layers", type=positive_int, metavar="N", help="blocks stored")
    what.add_argument("--heads", dest="num_heads", type=positive_int, metavar="H", help="attention heads")
    what.add_argument("--loop", type=loop_range, metavar="START:END", help="blocks that are looped")
    what.add_argument("--max-loops", type=num_loops, metavar="S", help="largest loop count in training")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--flops",
        type=positive_float,
        default=default_flops,
        help="training FLOPs of every arm (default: %(default)g)",
    )
    training.add_argument(
        "--convention",
        choices=flops.CONVENTIONS,
        default=flops.DEFAULT_CONVENTION,
        help="what counts as FLOPs (default: %(default)s); the table has all of them",
    )
    training.add_argument("--seeds", type=seeds, default=[0], metavar="N,N,...", help="(default: 0)")
    training.add_argument("--batch-size", type=positive_int, metavar="B", help="sequences of a step")
    training.add_argument("--lr", dest="learning_rate", type=positive_float, metavar="RATE")
    training.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="(default: %(default)s)"
    )
    training.add_argument(
        "--loop-law", metavar="LAW", help="of S: uniform, fixed:S, poisson, poisson:R or flops"
    )
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--num",
        type=positive_int,
        default=200,
        metavar="N",
        help="puzzles or windows held out (default: %(default)s)",
    )
    evaluation.add_argument(
        "--loops",
        type=loop_counts,
        metavar="S,S,...",
        help="loop counts of the looped arms (default: 1, half, all and twice the most in training)",
    )
    evaluation.add_argument(
        "--num-t",
        type=positive_int,
        default=16,
        metavar="N",
        help="text: times per window (default: %(default)s)",
    )


def run(args: argparse.Namespace, folder: StudyFolder, make_arms: MakeArms) -> list[Row]:
    """Train and evaluate what is missing; one row for each arm, seed, order and loop count."""
    base = _base_run(args)
    threads = args.threads or 1
    with usage_errors():
        arms = _chosen(make_arms(*_model_and_law(base)), args.arms)
        budget = Budget(args.flops, args.convention)
    _check_held_out(base)
    trained = [
        train_arm(base, arm, budget, seed, folder.arm(f"{arm.name}-seed{seed}"), threads, args.device_object)
        for seed in args.seeds
        for arm in arms
    ]
    judge = _sudoku_judge(args, base, threads) if base.data is None else _text_judge(args, folder, base)
    evaluations = {
        f"{arm.name} seed {arm.seed} S {loops} {order}": (arm, loops, order)
        for arm in trained
        for order in (ORDERS if base.data is None else ("likelihood",))
        for loops in _loops_of(arm, args.loops)
    }
    outcomes = folder.items(evaluations, lambda key: judge(*evaluations[key]), "evaluations")
    folder.facts["FLOP convention of the budget"] = args.convention
    folder.facts["training precision"] = args.precision
    folder.facts["evaluation precision"] = "float32"
    return [
        {
            **arm.to_dict(),
            "order": order,
            "num_loops": loops,
            "FLOPs of a network call": flops.forward_flops(
                arm.model.config, arm.length, loops, args.convention
            ),
            **outcome,
        }
        for (arm, loops, order), outcome in zip(evaluations.values(), outcomes, strict=True)
    ]


def _check_held_out(base: RunFile) -> None:
    """Complain before the training where there will be no text to judge the arms by."""
    if base.data is None:
        return
    if not text_data.are_corpora(base.data):
        if base.validation == 0:
            raise UsageError("--validation: got 0, but arms are judged by held-out text")
    elif not any(corpus.shards("validation") for corpus in text_data.open_corpora(base.data)):
        raise ValueError(
            f"--data: {text_data.named(base.data)} holds nothing out, and arms are judged by held-out text"
        )


def _chosen(arms: list[Arm], names: list[str] | None) -> list[Arm]:
    known = [arm.name for arm in arms]
    if unknown := [name for name in names or [] if name not in known]:
        raise UsageError(f"--arms: {', '.join(unknown)} not among {', '.join(known)}")
    return [arm for arm in arms if names is None or arm.name in names]


def _base_run(args: argparse.Namespace) -> RunFile:
    """The run every arm departs from."""
    is_text = args.preset in TEXT_RECIPES
    if is_text and args.data is None:
        raise UsageError(f"--preset {args.preset} trains on text: give --data PATH")
    if not is_text and args.data is not None:
        raise UsageError(f"--preset {args.preset} makes its own data and does not take --data")
    names = ("hidden_size", "num_layers", "num_heads", "max_loops")
    model = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.loop is not None:
        model["loop_start"], model["loop_end"] = args.loop
    names = ("batch_size", "learning_rate", "precision", "loop_law")
    training = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not is_text:
        return RunFile(args.preset, model, training, clues=args.clues)
    if args.clues is not None:
        raise UsageError(f"--preset {args.preset} is about text; leave out --clues")
    return RunFile(
        args.preset,
        model,
        training,
        data=located(args.data),
        tokenizer=args.tokenizer,
        length=args.length,
        validation=args.validation,
    )


def _model_and_law(base: RunFile) -> tuple[LoopMDMConfig, LoopLaw]:
    """Shape and loop law of the study's looped model; its vocabulary does not matter here."""
    if base.preset in SUDOKU_RECIPES:
        sudoku = SUDOKU_RECIPES[base.preset]
        config, training = LoopMDMConfig.preset(base.preset, **base.model), sudoku.training
    else:
        text = TEXT_RECIPES[base.preset]
        vocabulary = {"vocab_size": 2, "mask_token_id": 1}
        config = LoopMDMConfig.from_dict({**text.model, **base.model, **vocabulary})
        training = text.training
    law = base.training.get("loop_law", training.loop_law)
    length = base.length or config.max_length
    with usage_errors("--loop-law"):
        return config, LoopLaw.parse(law, config.max_loops, dims=config, length=length)


def _loops_of(arm: TrainedArm, asked: list[int] | None) -> list[int]:
    most = arm.model.config.max_loops
    if most == 1:
        return [1]
    return asked or sorted({1, max(1, most // 2), most, 2 * most})


def _sudoku_judge(
    args: argparse.Namespace, base: RunFile, threads: int
) -> Callable[[TrainedArm, int, str], Row]:
    spec = SUDOKU_RECIPES[base.preset].spec
    given = None if base.clues is None else parse_clues(base.clues, spec)
    clues = held_out_puzzles(spec, args.num, threads, given).clues

    def judge(arm: TrainedArm, loops: int, order: str) -> Row:
        result = solve_puzzles(arm.model, clues, spec, num_loops=loops, order=order)
        solved, boards = int(result.solved.sum()), len(clues)
        low, high = wilson(solved, boards)
        return {
            "boards": boards,
            "solved": solved,
            "value": solved / boards,
            "low": low,
            "high": high,
            "network_calls": int(result.network_calls.sum()),
            "seconds": result.seconds,
        }

    return judge


def _text_judge(
    args: argparse.Namespace, folder: StudyFolder, base: RunFile
) -> Callable[[TrainedArm, int, str], Row]:
    windows: text_data.Windows | None = None

    def judge(arm: TrainedArm, loops: int, order: str) -> Row:
        nonlocal windows
        if windows is None:  # an arm has the tokenizer
            tokenizer = text_data.load_tokenizer(folder.arm(f"{arm.name}-seed{arm.seed}"))
            held_out: text_data.TextData | CorpusData
            if text_data.are_corpora(base.data):
                held_out = held_out_of(text_data.open_corpora(base.data), arm.length)
            else:
                documents, cache = read_corpus(base).validation, folder.arm("tokens")
                held_out = text_data.pack("validation", documents, tokenizer, arm.length, cache)
            windows = text_data.windows(held_out, tokenizer, args.num)
        (result,) = evaluate_nll(
            arm.model,
            windows.batches,
            num_loops=[loops],
            num_t=args.num_t,
            bytes_per_token=windows.bytes_per_token,
        )
        spread = _Z * result.stderr
        return {
            "windows": result.num_sequences,
            "value": result.nll,
            "low": result.nll - spread,
            "high": result.nll + spread,
            "bits_per_byte": result.bits_per_byte,
        }

    return judge


def draw(rows: Sequence[Row], what: str) -> Figure:
    """Quality against loops; arms without a loop are levels. One panel for each order of decoding."""
    spent = max(row["training FLOPs, blocks+head"] for row in rows)
    orders = list(dict.fromkeys(row["order"] for row in rows))
    figure, axes = figures.new_figure(1, len(orders), width=5.4)
    most = max(row["num_loops"] for row in rows)
    for panel, order in zip(axes[0], orders, strict=True):
        chosen = [row for row in rows if row["order"] == order]
        for index, arm in enumerate(dict.fromkeys(row["arm"] for row in chosen)):
            for seed in dict.fromkeys(row["seed"] for row in chosen):
                points = figures.select(chosen, arm=arm, seed=seed)
                options = {
                    "color": f"C{index}",
                    "label": _label(points[0]) if seed == rows[0]["seed"] else None,
                }
                x, value, low, high = (
                    figures.column(points, name) for name in ("num_loops", "value", "low", "high")
                )
                if points[0]["max_loops"] == 1:
                    panel.axhline(value[0], linestyle="--", **options)
                    panel.axhspan(low[0], high[0], color=f"C{index}", alpha=0.12, linewidth=0)
                else:
                    figures.band(panel, x, value, low, high, **options)
        ticks = sorted({row["num_loops"] for row in rows} | {most})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("loops S in use")
        if order == "likelihood":
            panel.set_ylabel("NELBO (nats per token, 95 % interval)")
        else:
            panel.set_ylabel("share of boards solved (95 % interval)")
            panel.set_ylim(-0.03, 1.03)
            panel.set_title(f"order: {order.replace('_', ' ')}")
    axes[0][-1].legend()
    figure.suptitle(f"{what}, {spent:.2g} training FLOPs an arm (blocks+head)", fontsize=10)
    return figure


def _label(row: Row) -> str:
    shape = f"{row['layers']} layers"
    if row["max_loops"] > 1:
        shape += f", {row['looped']} looped, trained with S to {row['max_loops']}"
    return f"{row['arm']} ({shape})"
