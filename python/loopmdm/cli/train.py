"""Train a looped masked diffusion model, on your own text or on Sudoku.

The folder of a run holds config.json and model.safetensors (the averaged weights), the tokenizer, the state
to resume from, metrics.jsonl and loss.png. Ctrl-C stops after the present step and writes a checkpoint;
--resume continues with the very same losses. Under `torchrun` several processes share each step and stop
within two, and --resume takes any number of them that divides its micro-batches.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, get_args

from loopmdm.cli import family
from loopmdm.cli.output import print_json, print_table, show
from loopmdm.cli.parser import add_json, add_runtime, set_up
from loopmdm.cli.processes import TIMEOUT_MINUTES, process_group
from loopmdm.cli.runs import train_run
from loopmdm.model.between import LoopLoss
from loopmdm.model.config import INJECTIONS
from loopmdm.runs import likelihood
from loopmdm.runs.boards import SHARE_COLUMNS, share_row
from loopmdm.runs.initial import LORA_TARGETS
from loopmdm.runs.jobs import PRESETS, Job
from loopmdm.runs.options import Sources, count, loop_range, num_loops, number, positive_float, positive_int
from loopmdm.terminal import note
from loopmdm.train import plot_loss, read_metrics
from loopmdm.train.loggers import NAMES as LOGGERS
from loopmdm.train.metrics import METRICS_FILE
from loopmdm.train.parallel import FORMS

EPILOG = """examples:
  loopmdm train --data mytext/ --out run            a small byte-level model, minutes on two processor cores
  loopmdm train --data a.txt more/ "web/**/*.jsonl.gz" --text-field content --out run
  loopmdm train --data stdlib --tokenizer bpe:4096 --hidden 256 --steps 5000 --out run
  loopmdm train --preset sudoku6 --out run6         6x6 Sudoku, about ten minutes on one core
  loopmdm train --data "web/*.parquet" --stream --out run
  loopmdm train --data questions.jsonl --pairs question answer --out run
  loopmdm train --resume --out run                  continue a run that was stopped
  loopmdm train --family light=2,3,4,5 heavy=6 --data stdlib --out family
  loopmdm train --init-from mdlm.ckpt --tokenizer gpt2 --loop 1:3 --max-loops 12 --data corpus.txt --out tuned
  loopmdm train --init-from run --lora 8 --data pairs.jsonl --pairs prompt response --out chat
  torchrun --nproc-per-node 8 -m loopmdm train --preset small --parallel fsdp2 --data corpus --out run

forms of --data (docs/inputs.md says more):
  .jsonl .ndjson .jsonlines    a document a line, its field "text" (or --text-field)
  .json                        a document a record: an array, or objects one after the other
  .csv .tsv                    a document a row, its column "text"
  .parquet .arrow .feather     a document a row, its column "text" (needs pyarrow)
  any other name               a document a file
  .gz .bz2 .xz .zst            each of these, compressed
  a folder                     all files in it; of a data set with splits (saved by the package datasets, its
                               cache, the hub's) the split train
  "data/**/*.txt"              the files that match
  stdlib                       the sources of Python's standard library
  a corpus                     a folder made by `loopmdm data build`: tokenised once, of any size
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in DIR; its options are known"
    )
    what = parser.add_argument_group("what to train (options left out are the preset's)")
    what.add_argument(
        "--preset",
        choices=PRESETS,
        help="sudoku (9x9) or sudoku6 (6x6), which make their own data; text (default with --data), or MDLM's"
        " sizes tiny, small, medium, which need a GPU and --data",
    )
    what.add_argument(
        "--data",
        nargs="+",
        action=Sources,
        metavar="PATH",
        help="files, folders, patterns in quotes, or 'stdlib': text; .jsonl, .json, .csv, .tsv, .parquet and"
        " .arrow with a field or column of text; each of them compressed (.gz, .bz2, .xz, .zst); data sets"
        " saved by the package datasets (all forms: docs/inputs.md); or corpora made by `loopmdm data build`",
    )
    what.add_argument(
        "--weights",
        nargs="+",
        type=positive_float,
        metavar="W",
        help="shares of the corpora of --data, in any unit (default: by their sizes)",
    )
    what.add_argument(
        "--text-field", metavar="NAME", help="field or column that holds the text (default: text)"
    )
    what.add_argument(
        "--errors", choices=("strict", "replace"), help="bytes that are no text: refuse (default) or U+FFFD"
    )
    what.add_argument(
        "--tokenizer", metavar="T", help="byte (default), bpe:VOCAB, or a folder, file or hub id"
    )
    what.add_argument("--length", type=positive_int, metavar="L", help="tokens of a sequence (text: 128)")
    what.add_argument("--validation", type=number, metavar="SHARE", help="documents held out (default: 0.05)")
    what.add_argument(
        "--clues",
        metavar="C",
        help="given cells of training boards: minimal (no cell can go), LO:HI of them, or full (or none):"
        " boards masked anywhere (default: sudoku 28:40, sudoku6 minimal)",
    )
    what.add_argument(
        "--autoregressive",
        action="store_true",
        default=None,
        help="a model of the next token instead, to score samples with (loopmdm eval --samples --scorer)",
    )
    what.add_argument(
        "--family",
        nargs="+",
        metavar="KIND=N,...",
        help="plain models of several depths, such as light=2,3,4,5 heavy=6,6, each in its own folder of"
        " DIR; a count given again gets the next seed; the same command goes on where it was stopped",
    )
    what.add_argument(
        "--pairs",
        nargs="*",
        metavar="FIELD",
        help="--data is prompts and responses, of the fields prompt and response or of two others named here;"
        " a prompt is given, never masked, and only the response is learned",
    )
    what.add_argument(
        "--stream",
        action="store_true",
        default=None,
        help="tokenise --data while training, into the folder corpus of DIR; memory does not grow with it",
    )
    what.add_argument("--cache", type=Path, metavar="DIR", help="keep packed tokens here between runs")
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", dest="hidden_size", type=positive_int, metavar="D", help="hidden size")
    model.add_argument("--layers", dest="num_layers", type=positive_int, metavar="N", help="blocks stored")
    model.add_argument("--heads", dest="num_heads", type=positive_int, metavar="H", help="attention heads")
    model.add_argument(
        "--loop", type=loop_range, metavar="START:END", help="blocks that are looped, such as 1:3"
    )
    model.add_argument("--max-loops", type=num_loops, metavar="S", help="largest loop count in training")
    model.add_argument("--dropout", type=number, metavar="P")
    model.add_argument(
        "--damped",
        action="store_true",
        default=None,
        help="each of S loops goes 1/S of its way, which changes a plain model less",
    )
    model.add_argument(
        "--inject",
        choices=INJECTIONS[1:],
        help="give each loop but the first H(0) again: add it, or by a stable recurrence (parcae)",
    )
    model.add_argument(
        "--loop-embedding",
        type=positive_int,
        metavar="N",
        help="add a vector to what each loop but the first begins with, of N; the last serves later loops",
    )
    model.add_argument(
        "--carry-norm",
        action="store_true",
        default=None,
        help="a layer norm of what each loop but the first begins with",
    )
    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument(
        "--init-from",
        metavar="MODEL",
        help="begin with the weights of an MDLM checkpoint (.ckpt, folder, hub id) or of another run; --loop"
        " and --max-loops add loops to it",
    )
    tuning.add_argument(
        "--no-ema",
        action="store_true",
        default=None,
        help="begin with the raw weights of a Lightning checkpoint, not the averaged ones",
    )
    tuning.add_argument(
        "--lora",
        type=positive_int,
        metavar="RANK",
        help="train adapters only (peft), merged into model.safetensors",
    )
    tuning.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help=f"matrices of the blocks that get them (default: {' '.join(LORA_TARGETS)})",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive_int, metavar="N", help="optimizer steps")
    training.add_argument("--batch-size", type=positive_int, metavar="B", help="sequences of a micro-batch")
    training.add_argument("--accumulation", type=positive_int, metavar="N", help="micro-batches of a step")
    training.add_argument("--lr", dest="learning_rate", type=positive_float, metavar="RATE")
    training.add_argument("--warmup", dest="warmup_steps", type=count, metavar="STEPS")
    training.add_argument("--schedule", choices=("constant", "cosine", "linear"), help="the learning rate's")
    training.add_argument(
        "--decay",
        dest="decay_fraction",
        type=number,
        metavar="SHARE",
        help="share of the steps that bring it to 0",
    )
    training.add_argument("--weight-decay", type=number, metavar="W")
    training.add_argument(
        "--clip", type=number, metavar="NORM", help="largest norm of the gradient, 0 for no limit"
    )
    training.add_argument("--ema", type=number, metavar="DECAY", help="of the averaged weights")
    training.add_argument("--precision", choices=("fp32", "bf16"))
    training.add_argument(
        "--loop-law", metavar="LAW", help="of S: uniform, fixed:S, poisson, poisson:R or flops"
    )
    training.add_argument("--seed", type=count, metavar="N")
    training.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        help="muon: for the matrices of the blocks, and adamw for the rest",
    )
    training.add_argument(
        "--backprop-loops",
        type=positive_int,
        metavar="K",
        help="differentiate through the last K loops only (default: all)",
    )
    training.add_argument(
        "--loop-loss",
        choices=get_args(LoopLoss),
        help="loops that are read out and get a loss: the last (default), all alike (mean), or loop k in"
        " proportion to k (linear)",
    )
    training.add_argument(
        "--compile", action="store_true", default=None, help="the passes by torch.compile; not with fsdp2"
    )
    training.add_argument("--recompute", action="store_true", default=None, help="less memory, more time")
    ranks = parser.add_argument_group("several processes, started by torchrun (docs/training.md)")
    ranks.add_argument(
        "--parallel",
        choices=FORMS,
        help="ddp (default): every process holds the model; fsdp2: parameters, gradients and optimizer are"
        " split over all; hsdp: over those of a node, and copied from node to node",
    )
    ranks.add_argument(
        "--shard-size",
        type=positive_int,
        metavar="N",
        help="processes that hsdp splits the model over (default: those of a node)",
    )
    ranks.add_argument(
        "--timeout-minutes",
        type=positive_float,
        default=TIMEOUT_MINUTES,
        metavar="MIN",
        help="end the run when a process waits so long for another one within a step, but the first, as for"
        " one that hangs (default: %(default)g)",
    )
    log = parser.add_argument_group("checkpoints and evaluation")
    log.add_argument(
        "--keep",
        type=positive_int,
        metavar="N",
        help="keep the newest N checkpoints and the one with the best held-out NLL (default: 3 of several"
        " processes; of one, a single file)",
    )
    log.add_argument("--checkpoint-every", type=count, metavar="STEPS", help="0 for by the clock only")
    log.add_argument("--checkpoint-minutes", type=number, metavar="MIN", help="(default: 10; 0 for never)")
    log.add_argument("--eval-every", type=count, metavar="STEPS", help="0 for at the end only")
    log.add_argument(
        "--eval-size",
        type=positive_int,
        metavar="N",
        help="windows (text, 32) or puzzles (Sudoku, 100) held out",
    )
    log.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="at each evaluation write N samples for each of several S into metrics.jsonl (default: 2; 0 for"
        " none); of Sudoku, solutions of puzzles",
    )
    log.add_argument(
        "--sample-prompts",
        nargs="+",
        metavar="TEXT",
        help="what samples begin with, N for each (default: nothing; with --pairs, N held-out prompts)",
    )
    log.add_argument(
        "--log",
        nargs="+",
        choices=LOGGERS,
        default=(),
        metavar="PROGRAM",
        help="beside metrics.jsonl also for tensorboard, or wandb (offline); each needs its package",
    )
    log.add_argument(
        "--spike",
        type=number,
        metavar="FACTOR",
        help="warn of a loss so many times the median of the last 100, and save its batch in spikes/"
        " (default: 10; 0 for never)",
    )
    log.add_argument(
        "--peak-tflops",
        type=positive_float,
        metavar="T",
        help="of one device, to log the share that is used as mfu (default: by the name of the GPU)",
    )
    log.add_argument("--log-every", type=count, metavar="STEPS", help="(default: 10)")
    add_json(parser, "the outcome")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    if args.family is not None:
        return family.train(args)
    device = set_up(args)
    with process_group(device) as (rank, device):
        trained = train_run(args, rank, device)
        if rank:
            return 0
        if trained.signal is not None:
            note(
                f"stopped after step {trained.steps} of {trained.job.config.steps}; checkpoint written;"
                f" continue with: loopmdm train --resume --out {shlex.quote(str(args.out))}"
            )
            return trained.status
        _report(args, trained.job)
    return 0


def _report(args: argparse.Namespace, job: Job) -> None:
    records = read_metrics(args.out / METRICS_FILE)
    losses = [record for record in records if "loss" in record]
    evaluation: dict[str, Any] = next((r["evaluation"] for r in reversed(records) if "evaluation" in r), {})
    plot = None
    try:
        plot = str(plot_loss(args.out))
    except ImportError:
        note("no loss.png: matplotlib is not installed (pip install 'loopmdm-kernels[plot]')")
    except ValueError as error:
        note(f"no loss.png: {error}")
    first, last = losses[0] if losses else {}, losses[-1] if losses else {}
    if args.json:
        print_json(
            {
                "out": str(args.out),
                "preset": job.run.preset,
                "parameters": sum(p.numel() for p in job.model.parameters()),
                "steps": job.config.steps,
                **{name: last.get(name) for name in ("tokens", "flops", "seconds", "cpu_seconds")},
                "first_loss": first.get("loss"),
                "last_loss": last.get("loss"),
                "evaluation": evaluation,
                "plot": plot,
            }
        )
        return
    if losses:
        print(
            f"{job.config.steps} steps, {last['tokens']:,} tokens in {last['seconds']:.0f} s:"
            f" loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at the end\n"
        )
    if not evaluation:
        note("nothing was held out, so nothing is measured: --validation 0, or too little text for its share")
    if "held_out" in evaluation:
        print("held-out text, averaged weights:")
        print_table(likelihood.COLUMNS, likelihood.rows(evaluation["held_out"]))
    if "solved" in evaluation:
        print("held-out puzzles, averaged weights:")
        print_table(SHARE_COLUMNS, [share_row(one) for one in evaluation["solved"]])
    out = shlex.quote(str(args.out))
    if job.run.autoregressive:
        use = f"loopmdm eval RUN --samples 64 --scorer {out}"
    else:
        use = f"loopmdm sample {out}" if job.run.data else f"loopmdm solve FILE --model {out}"
    show(f"\nThe model is in {args.out}; try: {use}")
