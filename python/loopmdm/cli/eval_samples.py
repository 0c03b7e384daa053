"""`loopmdm eval RUN --samples N`: draw samples and measure them, beside held-out text as a yardstick."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopmdm.cli.decoding import DTYPES, decoding_of
from loopmdm.cli.plans import adapts, add_plan, note_beyond_training, plan_option
from loopmdm.model import LoopMDM
from loopmdm.model.flops import DEFAULT_CONVENTION
from loopmdm.plan import ComputePlan
from loopmdm.quality import Scorer, load_scorer, quality
from loopmdm.runs import text_data
from loopmdm.runs.held_out import held_out_text
from loopmdm.runs.models import load_tokenizer
from loopmdm.runs.options import UsageError, positive_int, usage_errors
from loopmdm.runs.provenance import provenance
from loopmdm.runs.run_file import RunFile
from loopmdm.sampling.sampler import sample_with
from loopmdm.terminal import note

COLUMNS = (
    *("text", "gen. PPL", "bits/byte", "entropy, nats", "distinct-2", "distinct-3", "self-BLEU"),
    *("calls/sample", "loops/call", "GFLOP/sample"),
)
_FIGURES = (
    "generative_perplexity",
    "bits_per_byte",
    "unigram_entropy",
    "distinct_2",
    "distinct_3",
    "self_bleu",
)
_ORDER = "ancestral"
_BATCH = 64
# Both hold for every sample drawn here: the race is the exact one, and no step takes the most probable token.
_RACE = "exact: fp32 with 64 random bits where they matter"
_PLAN = ("plan", "light", "heavy", "adaptive", "min_loops", "criterion")
_ONLY_WITH_SAMPLES = ("scorer", "steps", "dtype", "plan", "light", "heavy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("samples (of a model of text, instead of its likelihood)")
    group.add_argument("--samples", type=positive_int, metavar="N", help="draw N samples and measure them")
    group.add_argument(
        "--scorer",
        metavar="PATH",
        help="a run of `loopmdm train --autoregressive`, or a causal model of transformers, for perplexity",
    )
    group.add_argument(
        "--steps",
        type=positive_int,
        metavar="T",
        help="denoising steps (default: the plan's, or one a token)",
    )
    group.add_argument("--dtype", choices=("fp32", "bf16"), help="of the model's products (default: fp32)")
    add_plan(parser, "--plan", default="each of --loops")


def check(args: argparse.Namespace, *, text: bool) -> None:
    """Options that do not go together."""
    if args.samples is None:
        for name in _ONLY_WITH_SAMPLES:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: it belongs to --samples N")
        return
    if not text:
        raise UsageError(f"--samples: {args.model} solves Sudoku; its measure is the share of puzzles solved")
    if args.method != "stratified" or args.chain_order is not None:
        raise UsageError("--method, --chain-order: of the likelihood, which --samples does not measure")
    if args.samples < 2:
        raise UsageError("--samples: got 1, expected at least 2: the metrics compare samples with each other")
    if args.loops is not None and (args.plan is not None or adapts(args)):
        raise UsageError("--plan, --loops: a plan says the loops of every step; give one of them")


def measure(args: argparse.Namespace, model: LoopMDM, loops: list[int]) -> dict[str, Any]:
    """One row a plan, and one for held-out text where it is known; with everything a figure has to say."""
    tokenizer = load_tokenizer(model, args.model, args.tokenizer)
    scorer = None if args.scorer is None else load_scorer(args.scorer, tokenizer, device=model.device)
    if all(getattr(args, name) is None for name in _PLAN):
        with usage_errors():
            plans = [ComputePlan.constant(count) for count in loops]
    else:
        plans = [plan_option(args, model.device)]
    note_beyond_training(model, plans)
    run = RunFile.read(Path(args.model))
    length = args.length or (run.length if run is not None and run.length else model.config.max_length)
    rows = []
    for plan in plans:
        note(f"{args.samples} samples of {length} tokens, plan {plan}")
        rows.append(_sampled(args, model, plan, length, scorer))
    if args.data is not None or (run is not None and run.data is not None):
        text = held_out_text(args, model, args.model)
        windows = text_data.windows(text.data, text.tokenizer, args.samples)
        tokens = torch.cat([batch.input_ids for batch in windows.batches])
        if len(tokens) > 1:
            measured = _measured(tokens, model, scorer)
            rows.append({"text": "held-out text", "source": text.description, **measured})
    return {
        "samples": {
            "num": args.samples,
            "length": length,
            "order": _ORDER,
            "seed": args.seed,
            "temperature": 1.0,
            "precision": {"network": args.dtype or "fp32", "race": _RACE},
            "scorer": args.scorer,
            "flop_convention": DEFAULT_CONVENTION,
        },
        "rows": rows,
        **provenance(),
    }


def _sampled(
    args: argparse.Namespace, model: LoopMDM, plan: ComputePlan, length: int, scorer: Scorer | None
) -> dict[str, Any]:
    dtype = DTYPES[args.dtype or "fp32"]
    decoding = decoding_of(args, order=_ORDER, plan=plan, max_batch=_BATCH, dtype=dtype)
    with usage_errors():
        result = sample_with(model, decoding, args.samples, length)
    return {
        "text": f"plan {plan}",
        "plan": str(plan),
        "steps": result.num_steps,
        "exact": result.exact,
        "network_calls_per_sample": result.total_network_calls / args.samples,
        "executed": result.ledger.report(),
        "seconds": result.seconds,
        **_measured(result.tokens, model, scorer),
    }


def _measured(tokens: Tensor, model: LoopMDM, scorer: Scorer | None) -> dict[str, Any]:
    return quality(tokens, scorer, mask_token_id=model.config.mask_token_id)


def table(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of `COLUMNS`."""
    rows = []
    for row in document["rows"]:
        cells = [row["text"], *(_figure(row.get(name)) for name in _FIGURES)]
        executed = row.get("executed")
        if executed is None:
            rows.append((*cells, "-", "-", "-"))
            continue
        flops = executed["flops"][DEFAULT_CONVENTION] / document["samples"]["num"]
        calls = row["network_calls_per_sample"]
        rows.append((*cells, f"{calls:.1f}", f"{executed['mean_loops']:.2f}", f"{flops / 1e9:.4g}"))
    return rows


def describe(document: dict[str, Any]) -> str:
    """What the figures of `table` depend on, in words."""
    about, rows = document["samples"], document["rows"]
    steps = sorted({row["steps"] for row in rows if "steps" in row})
    bootstrap = rows[0]["bootstrap"]
    precision = about["precision"]
    return (
        f"{about['num']} samples of {about['length']} tokens, {about['order']} order, T = "
        f"{', '.join(map(str, steps))}, seed {about['seed']}, temperature 1.\n"
        f"Network in {precision['network']}; draws {precision['race']}.\n"
        f"Scorer: {about['scorer'] or 'none'}. ± is the standard error of {bootstrap['resamples']} bootstrap"
        f" resamples of the samples.\nFLOPs are those executed, convention {about['flop_convention']}."
    )


def _figure(estimate: dict[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.4g} ± {estimate['stderr']:.2g}"
