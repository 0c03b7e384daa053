"""Tokenise a corpus once, into shards that training reads without holding them in memory.

`loopmdm train --data DIR` takes the folder that `loopmdm data build` has made, or several of them.
"""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopmdm.cli.output import print_json, print_table, show
from loopmdm.cli.parser import FOOTER, Parser, add_json
from loopmdm.data.corpus import Corpus, Settings, build_corpus
from loopmdm.data.corpus.build import Counts
from loopmdm.data.corpus.store import PARTS
from loopmdm.data.text import found_files
from loopmdm.printable import printable_lines
from loopmdm.runs.options import Sources, number, positive_int, usage_errors
from loopmdm.runs.text_data import check_apart, corpus_tokenizer, located
from loopmdm.terminal import note

EPILOG = """examples:
  loopmdm data build --data web/ --tokenizer bpe:32000 --out corpus
  loopmdm data build --data "dumps/*.jsonl.zst" --tokenizer gpt2/ --validation 0.001 --out corpus
  loopmdm data show corpus --check
  loopmdm train --preset small --data corpus --out run
  loopmdm train --preset small --data web books --weights 0.8 0.2 --out run

A build that was stopped goes on when the same command is given again. `loopmdm data build --help` and
`loopmdm data show --help` have the options; both take --json."""
_EVERY = 5.0  # seconds between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", parser_class=Parser
    )
    build = _command(commands, "build", "tokenise files into a corpus")
    build.add_argument(
        "--data",
        nargs="+",
        action=Sources,
        required=True,
        metavar="PATH",
        help="files, folders, patterns in quotes, or 'stdlib', as in `loopmdm train` (docs/inputs.md)",
    )
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the corpus")
    build.add_argument(
        "--tokenizer",
        default="byte",
        metavar="T",
        help="byte (default), bpe:VOCAB (trained on 64 M characters of it), or a folder, file or hub id",
    )
    build.add_argument("--text-field", default="text", metavar="NAME", help="field or column of the text")
    build.add_argument(
        "--errors", choices=("strict", "replace"), default="strict", help="bytes that are not UTF-8"
    )
    build.add_argument(
        "--validation", type=number, default=0.01, metavar="SHARE", help="documents held out (default: 0.01)"
    )
    build.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="processes (default: one a processor, at most one for each 64 MiB of files)",
    )
    add_json(build, "the counts")
    show_corpus = _command(commands, "show", "count what a corpus holds, and verify it")
    show_corpus.add_argument("corpus", type=Path, metavar="DIR", help="folder of the corpus")
    show_corpus.add_argument("--check", action="store_true", help="read every token and compare checksums")
    add_json(show_corpus, "the counts")


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=FOOTER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.action == "show":
        corpus = Corpus(args.corpus)
        if args.check:
            corpus.check()
            note("every token has its checksum")
        _report(args, corpus)
        return 0
    with usage_errors():
        settings = Settings(args.text_field, args.errors, args.validation)
    sources = located(args.data)
    check_apart("--out", args.out, sources)
    found = found_files(sources)
    note(printable_lines(f"reading: {found.read()}"))
    made_of = {"data": sources, "tokenizer": args.tokenizer}
    corpus = build_corpus(
        found,
        corpus_tokenizer(args.tokenizer, found, args.out, args.text_field, args.errors),
        args.out,
        settings,
        workers=args.workers,
        made_of=made_of,
        on_progress=_Lines(),
    )
    for line in found.remarks():
        note(printable_lines(line))
    if settings.validation and not corpus.shards("validation"):
        note("no document was held out: give more text, or a larger --validation")
    _report(args, corpus)
    if not args.json:
        show(f"\ntry: loopmdm train --data {shlex.quote(str(args.out))} --out run")
    return 0


class _Lines:
    """Progress on standard error, a line now and then."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._before: Counts | None = None

    def __call__(self, counts: Counts) -> None:
        if self._before is None:
            self._before = counts
            if counts.documents:
                note(f"going on after {counts.documents:,} documents, {counts.tokens:,} tokens")
        now = time.perf_counter()
        if now - self._last >= _EVERY:
            rate = (counts.tokens - self._before.tokens) / (now - self._start)
            note(f"{counts.documents:,} documents, {counts.tokens:,} tokens, {rate:,.0f} tokens/s")
            self._last = now


def _report(args: argparse.Namespace, corpus: Corpus) -> None:
    totals = {part: corpus.total(part) for part in PARTS}
    if args.json:
        counts = {
            part: {n: v for n, v in asdict(t).items() if n in ("tokens", "documents", "text_bytes")}
            | {"shards": len(corpus.shards(part))}
            for part, t in totals.items()
        }
        print_json(
            {
                "corpus": str(corpus.folder),
                "digest": corpus.digest,
                "vocab_size": corpus.index.vocab_size,
                **counts,
            }
        )
        return
    print_table(
        ("part", "documents", "tokens", "bytes of text", "bytes a token", "shards"),
        [
            (
                part,
                f"{t.documents:,}",
                f"{t.tokens:,}",
                f"{t.text_bytes:,}",
                f"{t.text_bytes / t.tokens:.2f}" if t.tokens else "",
                str(len(corpus.shards(part))),
            )
            for part, t in totals.items()
        ],
    )
