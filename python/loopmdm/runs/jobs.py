"""What `loopmdm train` trains: model, data, configuration and evaluation of a run, from its run.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from loopmdm.data.corpus import Corpus, CorpusData, GrowingCorpus, StreamData
from loopmdm.data.sudoku.clues import parse_clues
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.model.loop_law import LoopLaw
from loopmdm.runs import text_data
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.evaluation import (
    SAMPLES,
    BoardEvaluation,
    CausalEvaluation,
    Sampler,
    TextEvaluation,
    prompts_of,
)
from loopmdm.runs.initial import add_lora, begin_with, read_initial
from loopmdm.runs.options import loop_errors, usage_errors
from loopmdm.runs.recipes import SUDOKU_RECIPES, TEXT_RECIPES
from loopmdm.runs.run_file import RunFile
from loopmdm.train import Trainable, TrainConfig
from loopmdm_kernels.files import refuse_files

Evaluate = Callable[[Any], dict[str, Any]]
PRESETS = (*SUDOKU_RECIPES, *TEXT_RECIPES)
# Sequences to evaluate on during training, where nothing else is asked for.
EVALUATED_WINDOWS = 32
EVALUATED_PUZZLES = 100


class Job(NamedTuple):
    """A run ready to start; `run` describes it completely."""

    model: Trainable
    data: Any
    config: TrainConfig
    evaluate: Evaluate | None
    run: RunFile
    tokenizer: Tokenizer | None = None

    def write(self, folder: Path) -> None:
        """Say in the folder of the run what it is: when nothing can be wrong with the options any more."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        self.run.write(folder)


def begun(job: Job, fresh: bool) -> Job:
    """The job, whose model has got what its run says it begins with.

    fresh: False where a checkpoint is read over the weights anyway.
    """
    run = job.run
    if run.init_from is not None and fresh:
        assert isinstance(job.model, LoopMDM)
        begin_with(job.model, read_initial(run.init_from, ema=not run.no_ema), run.init_from)
    if run.lora:
        assert isinstance(job.model, LoopMDM)
        add_lora(job.model, run.lora["rank"], run.lora["targets"], job.config.seed)
    return job


def sudoku_job(run: RunFile, threads: int) -> Job:
    """A run on puzzles made here; evaluated on puzzles of the test split."""
    recipe = SUDOKU_RECIPES[run.preset]
    with usage_errors(), loop_errors(_loop_of(run)):
        if run.clues is not None:
            recipe = dataclasses.replace(recipe, clues=parse_clues(run.clues, recipe.spec))
        model, data, config = recipe.build(run.preset, threads=threads, model=run.model, **run.training)
    _check_law(config, model, recipe.spec.cells)
    num = run.evaluation.get("size") or EVALUATED_PUZZLES
    samples = run.evaluation.get("samples", SAMPLES)

    evaluate = BoardEvaluation(
        recipe.spec, lambda: held_out_puzzles(recipe.spec, num, threads).clues, samples
    )
    return Job(model, data, config, evaluate, dataclasses.replace(run, training=config.to_dict()))


def pairs_job(run: RunFile, pairs: text_data.Pairs, tokenizer: Tokenizer) -> Job:
    """A run on prompts and responses; evaluated on responses to prompts held out."""
    plan = _text_plan(run, tokenizer, bool(pairs.validation))
    train = text_data.pack_pairs("training", pairs.train, tokenizer, plan.length, **plan.batches())
    validation = None
    if pairs.validation:
        validation = text_data.pack_pairs("validation", pairs.validation, tokenizer, plan.length)
    fingerprint = text_data.fingerprint(*([train] if validation is None else [train, validation]))
    return plan.job(run, tokenizer, train, validation, fingerprint)


def read_run_pairs(run: RunFile) -> text_data.Pairs:
    """The pairs of a run, split as it splits them."""
    assert run.data is not None and run.pairs is not None
    return text_data.read_run_pairs(run.data, run.pairs, run.errors, run.validation)


def text_tokenizer(run: RunFile, folder: Path, *, begun: bool) -> tuple[text_data.Corpus, Tokenizer]:
    """The documents of a run and its tokenizer: that in `folder` if the run has begun, else a new one.

    Raises:
        ValueError: the run has not begun, and the folder holds another tokenizer.
    """
    corpus = read_corpus(run)
    return corpus, run_tokenizer(run, corpus.train, folder, begun=begun)


def run_tokenizer(run: RunFile, texts: list[str], folder: Path, *, begun: bool) -> Tokenizer:
    """The tokenizer in the folder of a run that has begun, else a new one, trained on the texts if need be.

    Raises:
        ValueError: the run has not begun, and the folder holds another tokenizer.
    """
    if begun and (folder / text_data.TOKENIZER_FILE).is_file():
        return text_data.load_tokenizer(folder)
    tokenizer = text_data.make_tokenizer(run.tokenizer, texts)
    # A start that failed has left the very same files.
    files = tokenizer.texts().items()
    refuse_files(folder, [name for name, text in files if not _holds(folder / name, text)], "a new run")
    return tokenizer


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def read_corpus(run: RunFile, *, quiet: bool = False) -> text_data.Corpus:
    """The documents of a text run, split as it splits them."""
    assert run.data is not None
    return text_data.read_corpus(run.data, run.text_field, run.errors, run.validation, quiet=quiet)


def text_job(run: RunFile, corpus: text_data.Corpus, tokenizer: Tokenizer, cache: Path | None) -> Job:
    """A run on text; evaluated on windows of the documents held out."""
    plan = _text_plan(run, tokenizer, bool(corpus.validation))
    train = text_data.pack("training", corpus.train, tokenizer, plan.length, cache, **plan.batches())
    validation = None
    if corpus.validation:
        validation = text_data.pack("validation", corpus.validation, tokenizer, plan.length, cache)
    fingerprint = text_data.fingerprint(*([train] if validation is None else [train, validation]))
    return plan.job(run, tokenizer, train, validation, fingerprint)


def corpus_job(run: RunFile) -> Job:
    """A run on corpora that `loopmdm data build` made; evaluated on windows of what they hold out."""
    corpora = text_data.open_corpora(run.data)
    tokenizer = corpora[0].tokenizer
    held_out = any(corpus.shards("validation") for corpus in corpora)
    plan = _text_plan(run, tokenizer, held_out)
    with usage_errors():
        train = CorpusData(corpora, plan.length, weights=run.weights, **plan.batches())
    validation = held_out_of(corpora, plan.length) if held_out else None
    fingerprint = "-".join(corpus.digest for corpus in corpora)
    return plan.job(run, tokenizer, train, validation, fingerprint)


def held_out_of(corpora: list[Corpus], length: int) -> CorpusData:
    """What corpora hold out, in windows of a length."""
    have = [corpus for corpus in corpora if corpus.shards("validation")]
    return CorpusData(have, length, part="validation")


def stream_job(run: RunFile, corpus: GrowingCorpus) -> Job:
    """A run on a corpus that grows; evaluated on windows of the first shard of what it holds out."""
    length = run.length or TEXT_RECIPES[run.preset].length
    begun = corpus.beginning("validation" if run.validation else "train", length)
    held_out = any(shard.tokens >= length - 2 for shard in begun.shards("validation"))
    plan = _text_plan(run, corpus.tokenizer, held_out)
    with usage_errors():
        train = StreamData(corpus, plan.length, **plan.batches())
    validation = held_out_of([begun], plan.length) if held_out else None
    fingerprint = corpus.beginning("train", length).digest
    return plan.job(run, corpus.tokenizer, train, validation, fingerprint)


class _TextPlan(NamedTuple):
    """What follows from the options and the tokenizer, before any text is packed."""

    model: Trainable
    config: TrainConfig
    length: int

    def batches(self) -> dict[str, Any]:
        config = self.config
        return {"seed": config.seed, "accumulation": config.accumulation, "batch_size": config.batch_size}

    def job(
        self,
        run: RunFile,
        tokenizer: Tokenizer,
        train: text_data.TextData,
        validation: text_data.TextData | None,
        fingerprint: str,
    ) -> Job:
        evaluate: Evaluate | None = None
        if validation is not None:
            windows = text_data.windows(
                validation, tokenizer, run.evaluation.get("size") or EVALUATED_WINDOWS
            )
            evaluate = (
                CausalEvaluation(windows) if run.autoregressive else self._evaluation(run, windows, tokenizer)
            )
        assert run.data is not None
        if run.fingerprint not in (None, fingerprint):
            raise ValueError(
                f"the text of {text_data.named(run.data)} is not what this run began with, so it cannot be"
                " continued exactly; restore the files, or start a new run in another folder"
            )
        training = self.config.to_dict()
        run = dataclasses.replace(run, training=training, length=self.length, fingerprint=fingerprint)
        return Job(self.model, train, self.config, evaluate, run, tokenizer)

    def _evaluation(self, run: RunFile, windows: text_data.Windows, tokenizer: Tokenizer) -> TextEvaluation:
        number = run.evaluation.get("samples", SAMPLES)
        sampler = None
        if number:
            texts = run.evaluation.get("prompts", [])
            prompts = prompts_of(texts, windows, tokenizer, self.length, number)
            each = number if texts or run.pairs is None else 1
            sampler = Sampler(tokenizer, prompts, each, self.length, ends=run.pairs is not None)
        return TextEvaluation(windows, sampler)


def _loop_of(run: RunFile) -> tuple[int, int] | None:
    """The blocks that a run was asked to loop, None where they are the preset's."""
    return (run.model["loop_start"], run.model["loop_end"]) if "loop_end" in run.model else None


def _text_plan(run: RunFile, tokenizer: Tokenizer, held_out: bool) -> _TextPlan:
    recipe = TEXT_RECIPES[run.preset]
    length = run.length or recipe.length
    training = dict(run.training)
    if not held_out:
        training.setdefault("eval_every", 0)
    build = recipe.build_causal if run.autoregressive else recipe.build
    with usage_errors(), loop_errors(_loop_of(run)):
        model, config = build(tokenizer, length, model=run.model, **training)
    _check_law(config, model, length)
    return _TextPlan(model, config, length)


def _check_law(config: TrainConfig, model: Trainable, length: int) -> None:
    with usage_errors("--loop-law"):
        LoopLaw.parse(config.loop_law, model.config.max_loops, dims=model.config, length=length)
