"""Text a model has not been trained on, as several commands ask for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from loopmdm.data.corpus import Corpus, CorpusData, GrowingCorpus
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.runs import text_data
from loopmdm.runs.models import load_tokenizer
from loopmdm.runs.options import Sources, UsageError, positive_int
from loopmdm.runs.run_file import VALIDATION, RunFile


class HeldOutText(NamedTuple):
    data: text_data.TextData
    tokenizer: Tokenizer
    source: str | list[str]  # file, folder or name of the data, or several
    part: str  # "validation" or "all"
    length: int

    @property
    def description(self) -> str:
        return f"{self.part} documents of {text_data.named(self.source)}"


def add_text_options(group: Any, windows: int) -> None:
    """Which text, and how much of it."""
    group.add_argument(
        "--data",
        nargs=1,
        action=Sources,
        metavar="PATH",
        help="as in `loopmdm train`, several too (default: what the run was trained on)",
    )
    group.add_argument(
        "--part",
        choices=("validation", "all"),
        help="documents to take: those a training run with the same data holds out (default if the model was"
        " trained on this data), or all (default otherwise)",
    )
    group.add_argument(
        "--windows", type=positive_int, default=windows, metavar="N", help="sequences (default: %(default)s)"
    )
    group.add_argument(
        "--length", type=positive_int, metavar="L", help="tokens of one (default: that of training)"
    )
    group.add_argument(
        "--tokenizer", metavar="T", help="folder, file or hub id (default: the one beside the model)"
    )
    group.add_argument("--text-field", default="text", metavar="NAME", help="field or column of the text")
    group.add_argument(
        "--errors", choices=("strict", "replace"), default="strict", help="bytes that are not UTF-8"
    )


def held_out_text(args: argparse.Namespace, model: LoopMDM, name: str) -> HeldOutText:
    """What the options of `add_text_options` mean for the model of the folder `name`."""
    run = RunFile.read(Path(name))
    trained_on = None if run is None else run.data
    source = trained_on if args.data is None else text_data.located(args.data)
    if source is None:
        raise UsageError(f"--data: {name} does not say what it was trained on; give --data PATH")
    tokenizer = load_tokenizer(model, name, args.tokenizer)
    if tokenizer is None:
        raise UsageError(f"--tokenizer: {name} holds no tokenizer; give the one the model was trained with")
    if run is not None and source == trained_on:
        part, field, errors, share = "validation", run.text_field, run.errors, run.validation
    else:
        part, field, errors, share = "all", args.text_field, args.errors, VALIDATION
    part = args.part or part
    length = args.length or (run.length if run is not None and run.length else model.config.max_length)
    corpora: list[Corpus] = []
    if text_data.are_corpora(source):
        corpora = text_data.open_corpora(source)
    elif run is not None and run.stream and source == trained_on:
        corpora = [GrowingCorpus(Path(name) / text_data.STREAM_FOLDER)]  # as far as it has come
    if corpora:
        return HeldOutText(
            _of_corpora(corpora, source, part, tokenizer, length), tokenizer, source, part, length
        )
    if run is not None and run.pairs is not None and source == trained_on:
        pairs = text_data.read_run_pairs(source, run.pairs, errors, share if part == "validation" else 0.0)
        chosen = pairs.validation if part == "validation" else pairs.train
        return HeldOutText(
            text_data.pack_pairs(part, chosen, tokenizer, length), tokenizer, source, part, length
        )
    corpus = text_data.read_corpus(source, field, errors, share if part == "validation" else 0.0)
    documents = corpus.validation if part == "validation" else corpus.train
    return HeldOutText(text_data.pack(part, documents, tokenizer, length), tokenizer, source, part, length)


def _of_corpora(
    corpora: list[Corpus], source: str | list[str], part: str, tokenizer: Tokenizer, length: int
) -> text_data.TextData:
    if part == "validation":
        corpora = [corpus for corpus in corpora if corpus.shards(part)]
        if not corpora:
            raise ValueError(f"{text_data.named(source)} holds nothing out; give --part all, or other text")
    for corpus in corpora:
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{corpus.folder} was made with another tokenizer than the model was trained with"
            )
    return CorpusData(corpora, length, part=part)
