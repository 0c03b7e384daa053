"""Train a looped masked diffusion model, on your own text or on Sudoku.

The folder of a run holds config.json and model.safetensors (the averaged weights), the tokenizer, the state
to resume from, metrics.jsonl and loss.png. Ctrl-C stops after the present step and writes a checkpoint;
--resume continues with the very same losses. Under `torchrun` gradients are averaged over the processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from loopmdm.cli import likelihood
from loopmdm.cli.boards import SHARE_COLUMNS, share_row
from loopmdm.cli.jobs import PRESETS, Job, read_corpus, sudoku_job, text_job, text_tokenizer
from loopmdm.cli.output import note, print_json, print_table
from loopmdm.cli.parser import (
    INTERRUPTED,
    TERMINATED,
    UsageError,
    add_json,
    add_runtime,
    count,
    loop_range,
    number,
    positive_float,
    positive_int,
    set_up,
)
from loopmdm.cli.run_file import RunFile
from loopmdm.cli.text_data import load_tokenizer, located
from loopmdm.config import LoopMDMConfig
from loopmdm.train import TrainConfig, Trainer, plot_loss, read_metrics
from loopmdm.train.metrics import METRICS_FILE
from loopmdm.train.recipes import SUDOKU_RECIPES, TEXT_RECIPES
from loopmdm.train.state import STATE_FILE

EPILOG = """examples:
  loopmdm train --data mytext/ --out run            a small byte-level model, minutes on two processor cores
  loopmdm train --data stdlib --tokenizer bpe:4096 --hidden 256 --steps 5000 --out run
  loopmdm train --preset sudoku6 --out run6         6x6 Sudoku, about ten minutes on one core
  loopmdm train --resume --out run                  continue a run that was stopped
  torchrun --nproc-per-node 8 -m loopmdm train --preset small --data corpus.parquet --out run
"""
_DATA_FIELDS = (
    "preset",
    "data",
    "text_field",
    "errors",
    "tokenizer",
    "length",
    "validation",
    "autoregressive",
)
# Options that mean nothing to an autoregressive model, which has no loop and no dropout.
_LOOPED_ONLY = ("loop", "max_loops", "loop_law", "dropout")


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
        metavar="PATH",
        help="a text, .jsonl, .parquet or .arrow file, a folder of them, or 'stdlib'",
    )
    what.add_argument(
        "--text-field", metavar="NAME", help="field of .jsonl, .parquet and .arrow (default: text)"
    )
    what.add_argument(
        "--errors", choices=("strict", "replace"), help="bytes that are not UTF-8: refuse (default) or U+FFFD"
    )
    what.add_argument(
        "--tokenizer", metavar="T", help="byte (default), bpe:VOCAB, or a folder, file or hub id"
    )
    what.add_argument("--length", type=positive_int, metavar="L", help="tokens of a sequence (text: 128)")
    what.add_argument("--validation", type=number, metavar="SHARE", help="documents held out (default: 0.05)")
    what.add_argument(
        "--autoregressive",
        action="store_true",
        default=None,
        help="a model of the next token instead, to score samples with (loopmdm eval --samples --scorer)",
    )
    what.add_argument("--cache", type=Path, metavar="DIR", help="keep packed tokens here between runs")
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", dest="hidden_size", type=positive_int, metavar="D", help="hidden size")
    model.add_argument("--layers", dest="num_layers", type=positive_int, metavar="N", help="blocks stored")
    model.add_argument("--heads", dest="num_heads", type=positive_int, metavar="H", help="attention heads")
    model.add_argument(
        "--loop", type=loop_range, metavar="START:END", help="blocks that are looped, such as 1:3"
    )
    model.add_argument("--max-loops", type=positive_int, metavar="S", help="largest loop count in training")
    model.add_argument("--dropout", type=number, metavar="P")
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
    training.add_argument("--recompute", action="store_true", default=None, help="less memory, more time")
    log = parser.add_argument_group("checkpoints and evaluation")
    log.add_argument("--checkpoint-every", type=count, metavar="STEPS", help="0 for by the clock only")
    log.add_argument("--checkpoint-minutes", type=number, metavar="MIN", help="(default: 10; 0 for never)")
    log.add_argument("--eval-every", type=count, metavar="STEPS", help="0 for at the end only")
    log.add_argument(
        "--eval-size",
        type=positive_int,
        metavar="N",
        help="windows (text, 32) or puzzles (Sudoku, 100) held out",
    )
    log.add_argument("--log-every", type=count, metavar="STEPS", help="(default: 10)")
    add_json(parser, "the outcome")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    device = set_up(args)
    with _process_group(device) as (rank, device):
        described = _described_run(args)
        job = _prepare(described, args, rank)
        trainer = Trainer(job.model.to(device), job.data, job.config, args.out, evaluate=job.evaluate)
        if args.resume:
            done = trainer.resume()
            if rank == 0:
                note(f"resuming {args.out} after step {done} of {job.config.steps}")
        if rank == 0:
            job.run.write(args.out)
        with _stop_on_signals(trainer) as received:
            counters = trainer.train()
        if rank:
            return 0
        if received and counters.step < job.config.steps:
            note(
                f"stopped after step {counters.step} of {job.config.steps}; checkpoint written;"
                f" continue with: loopmdm train --resume --out {args.out}"
            )
            return INTERRUPTED if received[0] == signal.SIGINT else TERMINATED
        _report(args, job)
    return 0


@contextmanager
def _process_group(device: torch.device) -> Iterator[tuple[int, torch.device]]:
    """Joins the processes `torchrun` started; yields the rank and the device of this one."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield 0, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()


def _described_run(args: argparse.Namespace) -> RunFile:
    """The run the options ask for; with --resume, the stored one with what may be changed."""
    given_model = _given(args, LoopMDMConfig)
    if args.loop is not None:
        given_model["loop_start"], given_model["loop_end"] = args.loop
    given_training = _given(args, TrainConfig)
    if args.clip == 0:
        given_training["clip"] = None
    given_data = {name: getattr(args, name) for name in _DATA_FIELDS if getattr(args, name) is not None}
    if "data" in given_data:
        given_data["data"] = located(given_data["data"])
    evaluation = {} if args.eval_size is None else {"size": args.eval_size}
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"--out: {args.out} is a file, expected a folder")
    stored = RunFile.read(args.out) if args.resume else None
    if stored is not None:
        for name, value in (given_data | given_model).items():
            kept = getattr(stored, name) if name in _DATA_FIELDS else stored.model.get(name, "the preset's")
            if kept != value:
                raise UsageError(
                    f"--resume: in {args.out} {name} is {kept!r}, got {value!r}; leave the option out"
                )
        return dataclasses.replace(
            stored,
            training=stored.training | given_training,
            evaluation=stored.evaluation | evaluation,
        )
    if not args.resume and (args.out / STATE_FILE).exists():
        raise UsageError(
            f"{args.out} holds a run already: continue it with --resume, or choose another folder"
        )
    if args.resume and not given_data:
        raise FileNotFoundError(
            f"--resume: {args.out} holds no run; give --preset or --data to start one there"
        )
    preset = given_data.setdefault("preset", "text")
    if preset in SUDOKU_RECIPES and len(given_data) > 1:
        others = ", ".join("--" + name.replace("_", "-") for name in given_data if name != "preset")
        raise UsageError(f"--preset {preset} makes its own data and does not take {others}")
    if preset in TEXT_RECIPES and "data" not in given_data:
        raise UsageError("nothing to train on: give --data PATH, or --preset sudoku6 or sudoku")
    if args.autoregressive:
        _refuse(args, _LOOPED_ONLY, "--autoregressive trains a model without loops and dropout")
    if not 0 <= given_data.get("validation", 0) < 1:
        raise UsageError(f"--validation: got {args.validation}, expected a share of at least 0 and below 1")
    return RunFile(model=given_model, training=given_training, evaluation=evaluation, **given_data)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """An error of usage if the command line gives one of the options `names`."""
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise UsageError(f"{why}; leave out " + ", ".join("--" + name.replace("_", "-") for name in given))


def _given(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """Fields of a configuration that the command line names."""
    names = (f.name for f in dataclasses.fields(kind))
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _prepare(run: RunFile, args: argparse.Namespace, rank: int) -> Job:
    """The job of a run; rank 0 makes the tokenizer, and the others read it from the folder of the run."""
    if run.data is None:
        return sudoku_job(run, args.threads or 1)
    if rank == 0:
        corpus, tokenizer = text_tokenizer(run, args.out)
        tokenizer.save(args.out)
    if dist.is_initialized():
        dist.barrier()
    if rank:
        corpus, tokenizer = read_corpus(run), load_tokenizer(args.out)
    return text_job(run, corpus, tokenizer, args.cache)


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM end the training after the present step; yields the signals received."""
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        trainer.request_stop()
        # print is not safe in a signal handler
        os.write(2, b"\nstopping after this step, then a checkpoint is written (once more: stop at once)\n")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    if "held_out" in evaluation:
        print("held-out text, averaged weights:")
        print_table(likelihood.COLUMNS, likelihood.rows(evaluation["held_out"]))
    if "solved" in evaluation:
        print("held-out puzzles, averaged weights:")
        print_table(SHARE_COLUMNS, [share_row(one) for one in evaluation["solved"]])
    if job.run.autoregressive:
        use = f"loopmdm eval RUN --samples 64 --scorer {args.out}"
    else:
        use = f"loopmdm sample {args.out}" if job.run.data else f"loopmdm solve FILE --model {args.out}"
    print(f"\nThe model is in {args.out}; try: {use}")
