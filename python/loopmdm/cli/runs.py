"""One training run, from the options of the command line to its folder; `torchrun`, signals and resuming."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from loopmdm.cli.parser import INTERRUPTED, TERMINATED
from loopmdm.cli.processes import end_unhurried, wait_for_rank_zero
from loopmdm.data.corpus import CorpusStream, GrowingCorpus, Settings
from loopmdm.data.corpus.stream import SHARD_TOKENS
from loopmdm.data.pairs import FIELDS
from loopmdm.data.text import found_files
from loopmdm.model.between import check_compile, check_loop_loss
from loopmdm.model.config import LoopMDMConfig
from loopmdm.printable import printable_lines
from loopmdm.runs import text_data
from loopmdm.runs.initial import LORA_TARGETS, check_targets, model_fields, read_initial
from loopmdm.runs.jobs import (
    Job,
    begun,
    corpus_job,
    pairs_job,
    read_corpus,
    read_run_pairs,
    run_tokenizer,
    stream_job,
    sudoku_job,
    text_job,
    text_tokenizer,
)
from loopmdm.runs.options import UsageError, usage_errors
from loopmdm.runs.recipes import SUDOKU_RECIPES, TEXT_RECIPES
from loopmdm.runs.run_file import FILES, RunFile, replaced_by
from loopmdm.runs.text_data import load_tokenizer, located
from loopmdm.terminal import note
from loopmdm.train import RunFolder, TrainConfig, Trainer
from loopmdm.train.checkpoints import has_checkpoint
from loopmdm.train.loggers import Logger, logger
from loopmdm.train.parallel import check_compiled_form
from loopmdm_kernels.files import refuse_files

_DATA_FIELDS = (
    "preset",
    "data",
    "weights",
    "pairs",
    "stream",
    "text_field",
    "errors",
    "tokenizer",
    "length",
    "validation",
    "autoregressive",
    "clues",
)
_STOPPING = b"\nstopping after this step, then a checkpoint is written (once more: stop at once)\n"
# Options that mean nothing to an autoregressive model, which has no loop and no dropout.
_LOOPED_ONLY = {
    "loop": "--loop",
    "max_loops": "--max-loops",
    "loop_law": "--loop-law",
    "backprop_loops": "--backprop-loops",
    "damped": "--damped",
    "inject": "--inject",
    "loop_embedding": "--loop-embedding",
    "carry_norm": "--carry-norm",
    "loop_loss": "--loop-loss",
    "dropout": "--dropout",
    "samples": "--samples",
    "sample_prompts": "--sample-prompts",
}


# Options about documents that are still text.
_FROM_TEXT = {
    "tokenizer": "--tokenizer",
    "text_field": "--text-field",
    "errors": "--errors",
    "validation": "--validation",
    "cache": "--cache",
    "stream": "--stream",
}


class TrainedRun(NamedTuple):
    """What became of a run."""

    job: Job
    steps: int  # optimizer steps done
    signal: int | None  # what stopped it before its end

    @property
    def status(self) -> int:
        """Exit status of a command that ends with this run."""
        if self.signal is None:
            return 0
        return INTERRUPTED if self.signal == signal.SIGINT else TERMINATED


def train_run(args: argparse.Namespace, rank: int, device: torch.device) -> TrainedRun:
    """Train the run that the options ask for, or continue it, until it is done or a signal stops it."""
    run = described_run(args)
    with ExitStack() as stack:
        out: Path | RunFolder = args.out
        if rank == 0:
            out = stack.enter_context(RunFolder(args.out, FILES))
            if not _begun(args):
                refuse_files(args.out, replaced_by(run, args.out), "a new run")
        job = _prepare(run, args, rank, stack)
        logs = _loggers(args, job, stack) if rank == 0 else []
        trainer = Trainer(
            job.model.to(device),
            job.data,
            job.config,
            out,
            partial(_tell, logs),
            evaluate=job.evaluate,
            parallel=args.parallel,
            shard_size=args.shard_size,
            keep=args.keep,
            peak_flops=None if args.peak_tflops is None else 1e12 * args.peak_tflops,
            timeout=timedelta(minutes=args.timeout_minutes),
        )
        if args.resume:
            done = trainer.resume()
            if rank == 0:
                note(f"resuming {args.out} after step {done} of {job.config.steps}")
        if rank == 0:
            job.write(args.out)
        with _stop_on_signals(trainer) as received:
            counters = trainer.train()
    stopped = bool(received) and counters.step < job.config.steps
    return TrainedRun(job, counters.step, received[0] if stopped else None)


def _loggers(args: argparse.Namespace, job: Job, stack: ExitStack) -> list[Logger]:
    """What `--log` asks for, closed with the stack."""
    settings = {"model": job.model.config.to_dict(), "training": job.config.to_dict()}
    pairs = job.run.pairs is not None
    logs = (logger(name, args.out, settings, pairs=pairs) for name in args.log)
    return [stack.enter_context(closing(log)) for log in logs]


def _tell(logs: list[Logger], record: dict[str, Any]) -> None:
    for log in logs:
        log.write(record)


def _begun(args: argparse.Namespace) -> bool:
    """Whether the options continue the run in the folder; else they begin one there."""
    return bool(args.resume) and RunFile.read(args.out) is not None


def described_run(args: argparse.Namespace) -> RunFile:
    """The run the options ask for; with --resume, the stored one with what may be changed."""
    given_model = _given(args, LoopMDMConfig)
    if args.loop is not None:
        given_model["loop_start"], given_model["loop_end"] = args.loop
    given_training = _given(args, TrainConfig)
    if args.clip == 0:
        given_training["clip"] = None
    if args.pairs == []:
        args.pairs = list(FIELDS)
    given_data = {name: getattr(args, name) for name in _DATA_FIELDS if getattr(args, name) is not None}
    if "data" in given_data:
        given_data["data"] = located(given_data["data"])
    asked = {"size": args.eval_size, "samples": args.samples, "prompts": args.sample_prompts}
    evaluation = {name: value for name, value in asked.items() if value is not None}
    if args.sample_prompts is not None and args.samples == 0:
        raise UsageError("--sample-prompts: they belong to samples, and --samples 0 draws none")
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"--out: {args.out} is a file, expected a folder")
    if args.cache is not None and args.cache.exists() and not args.cache.is_dir():
        raise NotADirectoryError(f"--cache: {args.cache} is a file, expected a folder")
    data = given_data.get("data", [])
    # The folder of a run is left out of the data, but not while it is begun by a build.
    text_data.check_apart("--out", args.out, data, itself=not args.stream)
    if args.cache is not None:
        text_data.check_apart("--cache", args.cache, data)
    if args.lora_targets is not None and args.lora is None:
        raise UsageError("--lora-targets: they are those of --lora RANK")
    beginning = _beginning(args)
    stored = RunFile.read(args.out) if args.resume else None
    if args.no_ema and args.init_from is None and stored is None:
        raise UsageError("--no-ema is of --init-from")
    if stored is not None:
        for name, value in (given_data | given_model | beginning).items():
            kept = stored.model.get(name, "the preset's") if name in given_model else getattr(stored, name)
            gone = name == "init_from" and kept == os.path.abspath(value)  # by now
            if kept != value and not gone:
                raise UsageError(
                    f"--resume: in {args.out} {name} is {kept!r}, got {value!r}; leave the option out"
                )
        return _consistent(
            dataclasses.replace(
                stored,
                training=stored.training | given_training,
                evaluation=stored.evaluation | evaluation,
            ),
            args.parallel,
        )
    if args.parallel is not None and "WORLD_SIZE" not in os.environ:
        raise UsageError(f"--parallel {args.parallel}: start the command with torchrun (docs/training.md)")
    if args.shard_size is not None and args.parallel != "hsdp":
        raise UsageError("--shard-size is of --parallel hsdp")
    if not args.resume and has_checkpoint(args.out):
        raise UsageError(
            f"{args.out} holds a run already: continue it with --resume, or choose another folder"
        )
    if args.resume and not given_data:
        raise FileNotFoundError(
            f"--resume: {args.out} holds no run; give --preset or --data to start one there"
        )
    preset = given_data.setdefault("preset", "text")
    if preset in SUDOKU_RECIPES:
        refuse(args, {"sample_prompts": "--sample-prompts"}, f"--preset {preset} samples boards")
    others = ", ".join(
        "--" + name.replace("_", "-") for name in given_data if name not in ("preset", "clues")
    )
    if preset in SUDOKU_RECIPES and others:
        raise UsageError(f"--preset {preset} makes its own data and does not take {others}")
    if preset in TEXT_RECIPES and "data" not in given_data:
        raise UsageError("nothing to train on: give --data PATH, or --preset sudoku6 or sudoku")
    if preset in TEXT_RECIPES and text_data.are_corpora(given_data["data"]):
        refuse(args, _FROM_TEXT | {"pairs": "--pairs"}, "a corpus was tokenised and split when it was built")
        _check_weights(given_data)
    elif args.pairs is not None:
        _check_pairs(args)
    elif args.stream and args.cache is not None:
        raise UsageError("--cache: --stream keeps its tokens in the folder of the run; leave out --cache")
    elif "weights" in given_data:
        raise UsageError("--weights: they are those of corpora made by `loopmdm data build`")
    if beginning:
        refuse(args, {"autoregressive": "--autoregressive"}, "--init-from and --lora are of diffusion models")
    if args.init_from is not None:
        given_model = _begun_from(args, given_model, given_data)
    given_data |= beginning
    if preset in TEXT_RECIPES:
        refuse(args, {"clues": "--clues"}, f"--preset {preset} is about text")
    if args.autoregressive:
        refuse(args, _LOOPED_ONLY, "--autoregressive trains a model without loops, dropout and samples")
    if not 0 <= given_data.get("validation", 0) < 1:
        raise UsageError(f"--validation: got {args.validation}, expected a share of at least 0 and below 1")
    return _consistent(
        RunFile(model=given_model, training=given_training, evaluation=evaluation, **given_data),
        args.parallel,
    )


def _consistent(run: RunFile, form: str | None) -> RunFile:
    """The run, if its training goes with its model and its form."""
    with usage_errors():
        if run.training.get("compile"):
            check_compile(run.model)
            check_compiled_form(form)
        check_loop_loss(run.training.get("loop_loss", "last"), damped=run.model.get("damped", False))
    return run


def _beginning(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of run.json that say with which weights and adapters the run begins, where the options do."""
    fields: dict[str, Any] = {}
    if args.init_from is not None:
        there = os.path.exists(args.init_from)
        fields["init_from"] = os.path.abspath(args.init_from) if there else args.init_from
    if args.no_ema:
        fields["no_ema"] = True
    if args.lora is not None:
        check_targets(args.lora_targets or [])
        fields["lora"] = {"rank": args.lora, "targets": args.lora_targets or list(LORA_TARGETS)}
    return fields


def _begun_from(
    args: argparse.Namespace, given: dict[str, Any], given_data: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the model of a run that begins with a checkpoint, whose tokenizer and length it takes too."""
    source = args.init_from
    model = read_initial(source, ema=not args.no_ema)
    if given_data["preset"] in TEXT_RECIPES:
        given_data.setdefault("length", model.config.max_length)
        corpora = text_data.are_corpora(given_data["data"])
        if Path(source, text_data.TOKENIZER_FILE).is_file() and not corpora:
            given_data.setdefault("tokenizer", os.path.abspath(source))
        given = {"max_length": max(given_data["length"], model.config.max_length), **given}
    return model_fields(model, given)


def _check_pairs(args: argparse.Namespace) -> None:
    if len(args.pairs) != 2:
        raise UsageError(f"--pairs: got {len(args.pairs)} field(s), expected those of prompt and response")
    others = {"stream": "--stream", "cache": "--cache", "text_field": "--text-field", "weights": "--weights"}
    refuse(args, others, "--pairs reads prompts and responses")


def _check_weights(given: dict[str, Any]) -> None:
    num_corpora = len(text_data.as_list(given["data"]))
    if "weights" in given and len(given["weights"]) != num_corpora:
        raise UsageError(f"--weights: got {len(given['weights'])} for {num_corpora} corpora")


def refuse(args: argparse.Namespace, options: dict[str, str], why: str) -> None:
    """An error of usage if the command line gives one of the options, {name in `args`: as it is written}."""
    given = [option for name, option in options.items() if getattr(args, name) is not None]
    if given:
        raise UsageError(f"{why}; leave out {', '.join(given)}")


def _given(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """Fields of a configuration that the command line names."""
    names = (f.name for f in dataclasses.fields(kind))
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _prepare(run: RunFile, args: argparse.Namespace, rank: int, stack: ExitStack) -> Job:
    """The job of a run; rank 0 makes the tokenizer, and the others read it from the folder of the run."""
    fresh = not has_checkpoint(args.out)
    if run.data is None:
        return begun(sudoku_job(run, args.threads or 1), fresh)
    if text_data.are_corpora(run.data):
        job = begun(corpus_job(run), fresh)
        if rank == 0:
            note(_seen(job))
        return job
    if run.stream:
        return begun(_streamed(run, args, rank, stack), fresh)
    pairs = None if run.pairs is None else read_run_pairs(run)
    if rank == 0:
        if pairs is None:
            corpus, tokenizer = text_tokenizer(run, args.out, begun=_begun(args))
        else:
            tokenizer = run_tokenizer(run, pairs.texts, args.out, begun=_begun(args))
    if dist.is_initialized():
        if rank == 0:
            tokenizer.save(args.out)
        wait_for_rank_zero(rank)
    if rank:
        tokenizer = load_tokenizer(args.out)
        if pairs is None:
            corpus = read_corpus(run, quiet=True)
    job = text_job(run, corpus, tokenizer, args.cache) if pairs is None else pairs_job(run, pairs, tokenizer)
    return begun(job, fresh)


def _streamed(run: RunFile, args: argparse.Namespace, rank: int, stack: ExitStack) -> Job:
    """The job of a run on text that rank 0 tokenises meanwhile, into the folder of the run."""
    assert run.data is not None
    folder = args.out / text_data.STREAM_FOLDER
    if rank:
        return stream_job(run, GrowingCorpus(folder, lambda: None))  # torchrun ends it if rank 0 fails
    settings = Settings(
        run.text_field, "replace" if run.errors == "replace" else "strict", run.validation, SHARD_TOKENS
    )
    found = found_files(run.data)
    note(printable_lines(f"reading: {found.read()}"))
    tokenizer = text_data.corpus_tokenizer(run.tokenizer, found, folder, settings.text_field, settings.errors)
    made_of = {"data": run.data, "tokenizer": run.tokenizer}
    stream = stack.enter_context(CorpusStream(found, tokenizer, folder, settings, made_of=made_of))
    return stream_job(run, stream.corpus)


def _seen(job: Job) -> str:
    """How much there is of the corpora of a run, and how often it comes."""
    data, config = job.data, job.config
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    sequences = config.steps * config.accumulation * world_size * config.batch_size
    repeats = ", ".join(f"{times:.2f}" for times in data.repeats(sequences))
    return (
        f"{len(data):,} sequences of {data.length} tokens; {config.steps:,} steps read {sequences:,}:"
        f" every sequence comes {repeats} times"
    )


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM end the training after the present step, or within two of several processes.

    Yields the signals received.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        # After the Ctrl-C of a terminal torchrun sends its own SIGTERM, which asks for no more.
        if received and (not dist.is_initialized() or number == received[0]):
            raise KeyboardInterrupt
        received.append(number)
        trainer.request_stop()
        # torchrun ends processes so when one is lost: nothing will stop in order then.
        if dist.is_initialized():
            return
        # print is not safe in a signal handler, and the terminal may be gone
        with suppress(OSError):
            os.write(2, _STOPPING)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except Exception:
        if dist.is_initialized():  # what is to be closed before the error is said may take a while
            end_unhurried()
            del before[signal.SIGTERM]
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
