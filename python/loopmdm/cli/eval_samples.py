"""`loopmdm eval RUN --samples N`: draw samples and measure them, beside held-out text as a yardstick."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm.cli.decoding import add_drawing, chosen_decoding, drawing_options
from loopmdm.cli.output import writable
from loopmdm.cli.plans import adapts, add_plan, note_beyond_training, plan_option
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.model.flops import DEFAULT_CONVENTION
from loopmdm.plan import ComputePlan
from loopmdm.quality import load_scorer, quality
from loopmdm.quality.cost import Cost
from loopmdm.quality.duo_samples import (
    SamplesFile,
    duo_perplexity,
    is_samples,
    read_samples,
    write_samples,
)
from loopmdm.quality.mauve import mauve, needed
from loopmdm.quality.scorer import CausalScorer, TransformersScorer
from loopmdm.runs import text_data
from loopmdm.runs.held_out import held_out_text
from loopmdm.runs.models import load_tokenizer
from loopmdm.runs.options import UsageError, positive_int, usage_errors
from loopmdm.runs.provenance import provenance
from loopmdm.runs.run_file import RunFile
from loopmdm.sampling import Decoding
from loopmdm.sampling.sampler import sample_with
from loopmdm.terminal import note

_ORDER = "ancestral"
_BATCH = 64
_EXACT = "exact: fp32 with 64 random bits where they matter"
_REFERENCE = "the reference's: fp32, with tokens rarer than 2^-24 lost"
_NONE = "none: the most probable token"
_PLAN = ("plan", "light", "heavy", "adaptive", "min_loops", "criterion", "loop", "damped")
_ONLY_WITH_SAMPLES = ("scorer", "mauve", "save_samples", "dtype", "plan", "light", "heavy")


class _Measures(NamedTuple):
    """What samples are measured with."""

    model: LoopMDM
    tokenizer: Tokenizer | None
    scorer: CausalScorer | TransformersScorer | None
    featurizer: CausalScorer | TransformersScorer | None
    human: Tensor | None  # held-out text [M, L]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("samples (of a model of text, instead of its likelihood)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--samples", type=positive_int, metavar="N", help="draw N samples and measure them")
    source.add_argument(
        "--from-samples",
        metavar="FILE",
        help="measure those of a file: what --save-samples wrote, or Duo's samples.json",
    )
    group.add_argument(
        "--save-samples", type=Path, metavar="FILE", help="write the samples as JSON in Duo's form"
    )
    group.add_argument(
        "--scorer",
        metavar="PATH",
        help="a run of `loopmdm train --autoregressive`, or a causal model of transformers, for perplexity",
    )
    group.add_argument(
        "--mauve",
        metavar="PATH",
        help="MAUVE beside held-out text, by the package mauve-text, with features of such a model",
    )
    group.add_argument("--dtype", choices=("fp32", "bf16"), help="of the model's products (default: fp32)")
    add_plan(parser, "--plan", default="each of --loops")
    add_drawing(parser, "samples: ")


def wanted(args: argparse.Namespace) -> bool:
    """Whether samples are to be measured."""
    return args.samples is not None or args.from_samples is not None


def check(args: argparse.Namespace, *, text: bool) -> None:
    """Options that do not go together."""
    drawing = drawing_options()
    drawn = [flag for name, (flag, default) in drawing.items() if getattr(args, name) != default]
    if not wanted(args):
        given = [name for name in _ONLY_WITH_SAMPLES if getattr(args, name) is not None]
        for flag in (*(f"--{name.replace('_', '-')}" for name in given), *drawn):
            raise UsageError(f"{flag}: it belongs to --samples N")
        return
    if not text:
        option = "--samples" if args.from_samples is None else "--from-samples"
        raise UsageError(f"{option}: {args.model} solves Sudoku; its measure is the share of puzzles solved")
    if args.method != "stratified" or args.chain_order is not None:
        raise UsageError("--method, --chain-order: of the likelihood, which --samples does not measure")
    if args.order == "both":
        raise UsageError("--order: both is of Sudoku; expected one order")
    if args.from_samples is not None:
        given = [name for name in ("save_samples", "dtype", "loops", "order", *_PLAN) if getattr(args, name)]
        for flag in (*(f"--{name.replace('_', '-')}" for name in given), *drawn):
            raise UsageError(f"{flag}: of drawing samples, and --from-samples draws none")
        return
    if args.samples < 2:
        raise UsageError("--samples: got 1, expected at least 2: the metrics compare samples with each other")
    if args.loops is not None and (args.plan is not None or adapts(args)):
        other = next(name for name in ("plan", "adaptive", "criterion") if getattr(args, name) is not None)
        raise UsageError(f"--{other}, --loops: a plan says the loops of every step; give one of them")
    if args.save_samples is not None:
        if _asks_for_loops(args) and len(args.loops or ()) != 1:
            raise UsageError("--save-samples: it keeps those of one plan; give --plan, or one of --loops")
        writable("--save-samples", args.save_samples)
        if args.save_samples.is_file() and not is_samples(args.save_samples):
            raise UsageError(
                f"--save-samples: {args.save_samples} is a file that holds no samples; choose another name"
            )


def measure(args: argparse.Namespace, model: LoopMDM, loops: list[int]) -> dict[str, Any]:
    """One row a plan, and one for held-out text where it is known; with everything a figure has to say."""
    tokenizer = load_tokenizer(model, args.model, args.tokenizer)
    if tokenizer is None and (args.mauve or args.from_samples or args.save_samples):
        raise UsageError(f"--tokenizer: {args.model} holds no tokenizer; give the one it was trained with")
    if args.mauve is not None:
        needed()
    scorer, featurizer = (
        None if path is None else load_scorer(path, tokenizer, device=model.device)
        for path in (args.scorer, args.mauve)
    )
    run = RunFile.read(Path(args.model))
    file = None
    if args.from_samples is not None:
        assert tokenizer is not None
        file = read_samples(args.from_samples, tokenizer)
        if len(file.tokens) < 2:
            raise ValueError(
                f"--from-samples: {args.from_samples} holds one sample, expected at least 2:"
                " the metrics compare samples with each other"
            )
    number = args.samples if file is None else len(file.tokens)
    human, source = None, None
    if args.data is not None or (run is not None and run.data is not None):
        text = held_out_text(args, model, args.model)
        windows = text_data.windows(text.data, text.tokenizer, number)
        human, source = torch.cat([batch.input_ids for batch in windows.batches]), text.description
    if args.mauve is not None and human is None:
        raise UsageError(f"--mauve: {args.model} does not say what it was trained on; give --data PATH")
    measures = _Measures(model, tokenizer, scorer, featurizer, human)
    if file is not None:
        about: dict[str, Any] = {"num": number, "length": file.tokens.shape[1]}
        about |= {"file": args.from_samples, "encoded": file.encoded}
        rows = [_of_file(args, file, measures)]
    else:
        length = args.length or (run.length if run is not None and run.length else model.config.max_length)
        about, rows = _drawn(args, measures, loops, length)
    if human is not None and len(human) > 1:
        measured = quality(human, scorer, mask_token_id=model.config.mask_token_id)
        rows.append({"text": "held-out text", "source": source, **measured})
    return {
        "samples": {**about, "scorer": args.scorer, "flop_convention": DEFAULT_CONVENTION},
        "rows": rows,
        **provenance(),
    }


def _asks_for_loops(args: argparse.Namespace) -> bool:
    """Whether each of --loops is a plan of its own."""
    return all(getattr(args, name) is None for name in _PLAN)


def _drawn(
    args: argparse.Namespace, measures: _Measures, loops: list[int], length: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What holds for all samples that are drawn, and a row for each plan."""
    model = measures.model
    if _asks_for_loops(args):
        with usage_errors():
            plans = [ComputePlan.constant(count) for count in loops]
    else:
        plans = [plan_option(args, model.device)]
    order = args.order or _ORDER
    ways = [chosen_decoding(args, measures.tokenizer, plan, order=order, max_batch=_BATCH) for plan in plans]
    note_beyond_training(model, plans)
    rows = []
    for decoding in ways:
        note(f"{args.samples} samples of {length} tokens, plan {decoding.plan}")
        rows.append(_sampled(args, decoding, length, measures))
    decoding = ways[0]
    race = _REFERENCE if decoding.reference_numerics else _EXACT if decoding.temperature else _NONE
    about = {
        "num": args.samples,
        "length": length,
        "order": order,
        "seed": args.seed,
        "temperature": decoding.temperature,
        "options": _options(decoding),
        "precision": {"network": args.dtype or "fp32", "race": race},
    }
    return about, rows


def _sampled(
    args: argparse.Namespace, decoding: Decoding, length: int, measures: _Measures
) -> dict[str, Any]:
    with usage_errors():
        result = sample_with(measures.model, decoding, args.samples, length)
    cost = Cost.of(
        result.ledger,
        int(result.lengths.sum()),
        precision=decoding.dtype or measures.model.compute_dtype,
        plan=decoding.plan,
        steps=result.num_steps,
        seeds={"samples": decoding.seed},
    )
    measured = _measured(result.tokens, measures, length)
    row = {
        "text": f"plan {decoding.plan}",
        "plan": str(decoding.plan),
        "steps": result.num_steps,
        "exact": result.exact,
        "network_calls_per_sample": result.total_network_calls / args.samples,
        "executed": result.ledger.report(),
        "cost": cost.to_dict(),
        "seconds": result.seconds,
        **measured,
    }
    if args.save_samples is not None:
        assert measures.tokenizer is not None
        facts = {"model": args.model, "cost": cost.to_dict(), "decoding": _options(decoding)}
        own = measured["duo"]
        write_samples(
            args.save_samples,
            result.tokens,
            measures.tokenizer,
            generative_ppl=own["generative_ppl"],
            entropy=own["entropy"],
            facts=facts,
        )
        note(f"wrote {args.save_samples}")
    return row


def _of_file(args: argparse.Namespace, file: SamplesFile, measures: _Measures) -> dict[str, Any]:
    """The row of samples in a file, with what the file says of them."""
    stated = {"generative_ppl": file.generative_ppl, "entropy": file.entropy}
    cost = file.facts.get("cost")
    known = {field.name for field in fields(Cost)}
    own = measures.model.config.max_length if file.encoded else file.tokens.shape[1]
    row = {
        "text": Path(args.from_samples).name,
        "stated": stated,
        **_measured(file.tokens, measures, args.length or own),
    }
    return row | ({"cost": cost} if isinstance(cost, dict) and set(cost) == known else {})


def _measured(tokens: Tensor, measures: _Measures, length: int) -> dict[str, Any]:
    """All figures of samples [N, L] that were drawn at this length; under `duo` those of Duo's file, which
    weigh tokens and not samples.
    """
    tokens = tokens.cpu()
    found = quality(tokens, measures.scorer, mask_token_id=measures.model.config.mask_token_id)
    perplexity = None
    if measures.scorer is not None and measures.tokenizer is not None:
        perplexity = duo_perplexity(measures.scorer, tokens, measures.tokenizer, length)
    found["duo"] = {"generative_ppl": perplexity, "entropy": found["unigram_entropy"]["value"]}
    if measures.featurizer is not None:
        assert measures.human is not None and measures.tokenizer is not None
        with usage_errors():
            found["mauve"] = mauve(measures.featurizer, measures.human, tokens, measures.tokenizer)
    return found


def _options(decoding: Decoding) -> dict[str, Any]:
    """What is not at its default, beside what a row says itself; JSON values."""
    values = {field.name: getattr(decoding, field.name) for field in fields(Decoding)}
    plain = Decoding()
    return {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in values.items()
        if name not in ("plan", "dtype", "seed", "max_batch") and value != getattr(plain, name)
    }
