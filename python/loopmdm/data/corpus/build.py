"""Documents tokenised once, in several processes, into the shards of a corpus; a build that stops goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from loopmdm.data.array_cache import Array
from loopmdm.data.corpus.store import (
    INDEX_FILE,
    PARTS,
    Corpus,
    Index,
    Shard,
    shard_files,
)
from loopmdm.data.files import DataFile, Found
from loopmdm.data.packing import token_dtype
from loopmdm.data.raw import Errors
from loopmdm.data.records import NotText, documents_of, text_of, whole
from loopmdm.data.text import content_hash
from loopmdm.data.tokenizer import BACKEND_FILE, Tokenizer, load_tokenizer
from loopmdm.formats.folders import read_json
from loopmdm_kernels.files import remove_leftovers, write_files
from loopmdm_kernels.locks import LOCK_FILE, Lock
from loopmdm_kernels.values import check_at_least

# Texts, or records with a field of text.
Documents: TypeAlias = "Found | Iterable[str | Mapping[str, Any]]"

PLAN_FILE = "build.json"
PLAN_VERSION = 2  # of what a build writes down to go on
UNIT_BYTES = 2**26  # of source files that one process tokenises in one go
BATCH_CHARS = 2**21  # of documents that are handed to the tokenizer together
_WAIT = 0.5  # seconds between two looks at the workers


@dataclass(frozen=True)
class Settings:
    """How documents become shards; a build goes on only with the same.

    Attributes:
        text_field: field or column that holds the text.
        errors: bytes that are not UTF-8: "strict" or "replace", as in `read_documents`.
        validation: share of the documents held out, by a hash of their content; equal documents lie on the
            same side.
        shard_tokens: tokens of both parts after which their shards are written.
    """

    text_field: str = "text"
    errors: Errors = "strict"
    validation: float = 0.01
    shard_tokens: int = 2**24

    def __post_init__(self) -> None:
        if self.errors not in ("strict", "replace"):
            raise ValueError(f"errors is {self.errors!r}; accepted: 'strict' or 'replace'")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}; accepted: 0 <= validation < 1")
        check_at_least("shard_tokens", self.shard_tokens, 1)


class Counts(NamedTuple):
    """What a build has done so far, in this call and before."""

    documents: int
    tokens: int
    text_bytes: int

    def __add__(self, other: Any) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class _Unit:
    """Documents that one process tokenises one after the other, and how far it has come."""

    number: int
    files: list[DataFile]
    documents: Iterable[str | Mapping[str, Any]] | None = None  # instead of files
    consumed: int = 0  # documents in finished shards, and empty ones between them
    done: bool = False
    shards: tuple[Shard, ...] = ()

    def path(self, folder: Path) -> Path:
        return folder / f"unit-{self.number:05d}.json"

    def read(self, folder: Path) -> None:
        if self.path(folder).exists():
            values = read_json(self.path(folder))
            self.consumed, self.done = values["consumed"], values["done"]
            self.shards = tuple(Shard(**one) for one in values["shards"])

    def text(self) -> str:
        shards = [asdict(shard) for shard in self.shards]
        return json.dumps({"consumed": self.consumed, "done": self.done, "shards": shards}) + "\n"

    def counts(self) -> Counts:
        sums = (sum(getattr(s, n) for s in self.shards) for n in ("documents", "tokens", "text_bytes"))
        return Counts(*sums)


def build_corpus(
    documents: Documents,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    workers: int | None = None,
    made_of: dict[str, Any] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
) -> Corpus:
    """Tokenise documents into shards in a folder, and open the corpus.

    A build that was interrupted, or killed at any moment, goes on after its last whole shard when it is
    called again with the same arguments; the corpus is the same, whatever the number of workers and stops.

    Args:
        documents: files, from `found_files`; or texts, or records with a field `settings.text_field`, such as
            a data set of the package datasets, streamed or not. These are read in this process; a build that
            goes on has to be given the same again, and calls its method `skip` if it has one.
        tokenizer: of the corpus; saved beside the shards.
        folder: a new folder, or the one of an interrupted build.
        settings: of the documents and the split.
        workers: processes; None: one a processor, at most one for each 64 MiB of files. With more than one,
            a script needs the usual `if __name__ == "__main__":`.
        made_of: what the index tells people about where the documents come from.
        on_progress: called at the start and now and then.

    Raises:
        ValueError: no document; a file or a record that is not what it should be (with its name and line); a
            folder with other files, or with the build of something else; workers for what is no file.
        LockedError: another process builds there.
        OSError: the disk is full, say; what is finished stays.
    """
    target, settings = Path(folder), settings or Settings()
    if workers is not None:
        check_at_least("workers", workers, 1)
    if not isinstance(documents, Found):
        if isinstance(documents, str) or not isinstance(documents, Iterable):
            kind = type(documents).__name__
            raise TypeError(
                f"documents is a {kind}; accepted: what found_files gives, or an iterable of texts"
            )
        if workers not in (None, 1):
            raise ValueError(f"workers is {workers}; documents that are no files are read by one process")
        workers = 1
    target.mkdir(parents=True, exist_ok=True)
    with Lock(target / LOCK_FILE, str(target)):
        remove_leftovers(target)
        units = _units(documents)
        _begin(target, units, tokenizer, settings, made_of or {})
        for unit in units:
            unit.read(target)
        wanted = min(workers or os.cpu_count() or 1, max(1, sum(not unit.done for unit in units)))
        _tokenise(target, units, settings, wanted, on_progress or (lambda _: None))
        for unit in units:
            unit.read(target)
        shards = tuple(shard for unit in units for shard in unit.shards)
        if not any(shard.part == "train" for shard in shards):
            remarks = documents.remarks() if isinstance(documents, Found) else []
            raise ValueError("; ".join(["the sources hold no document to train on", *remarks]))
        index = Index(tokenizer.fingerprint, tokenizer.vocab_size, shards, made_of=made_of or {})
        write_files({target / INDEX_FILE: index.text()})
        for path in (*(unit.path(target) for unit in units), target / PLAN_FILE):
            path.unlink(missing_ok=True)
    return Corpus(target)


def finished_shards(folder: Path) -> list[Shard]:
    """The shards that a build has finished, those which will be the first of the corpus."""
    shards: list[Shard] = []
    unit = _Unit(0, [])
    while unit.path(folder).exists():
        unit.read(folder)
        shards += unit.shards
        if not unit.done:
            break
        unit = _Unit(unit.number + 1, [])
    return shards


def has_shards(folder: Path) -> bool:
    """Whether a build has finished a shard in a folder, which a build of something else would lose."""
    return any(folder.glob("*.bin"))


def _units(documents: Documents) -> list[_Unit]:
    if not isinstance(documents, Found):
        return [_Unit(0, [], documents)]
    units: list[_Unit] = []
    size = UNIT_BYTES
    for file in documents.files:
        if size >= UNIT_BYTES:
            units.append(_Unit(len(units), []))
            size = 0
        units[-1].files.append(file)
        size += _size(file.path)
    return units


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _begin(
    folder: Path, units: list[_Unit], tokenizer: Tokenizer, settings: Settings, made_of: dict[str, Any]
) -> None:
    """Write what is going to be built, or compare it with what was begun."""
    files = [
        [str(f.path), f.kind, _size(f.path), f.path.stat().st_mtime_ns] for unit in units for f in unit.files
    ]
    plan = {
        "version": PLAN_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "settings": asdict(settings),
        "made_of": made_of,
        "files": files,
    }
    path = folder / PLAN_FILE
    if path.exists():
        begun = read_json(path)
        changed = [name for name in plan if begun.get(name) != plan[name]]
        if not changed:
            return
        if has_shards(folder):
            raise ValueError(
                f"{folder} holds an unfinished build of something else: its {', '.join(changed)} changed;"
                " delete the folder, or choose another"
            )
        for left in (*folder.glob("unit-*.json"), folder / BACKEND_FILE):
            left.unlink(missing_ok=True)
    else:
        _refuse_others(folder)
    texts = {folder / name: text for name, text in tokenizer.texts().items()}
    write_files({**texts, path: json.dumps(plan) + "\n"})  # a full disk takes all of them or none


def _refuse_others(folder: Path) -> None:
    others = sorted(p.name for p in folder.iterdir() if p.name != LOCK_FILE)
    if others:
        what = (
            "a finished corpus"
            if INDEX_FILE in others
            else f"{len(others)} other file(s), {others[0]} among them"
        )
        raise ValueError(f"{folder} holds {what}; choose a new folder")


def _tokenise(
    folder: Path, units: list[_Unit], settings: Settings, workers: int, on_progress: Callable[[Counts], None]
) -> None:
    total = Counts(0, 0, 0)
    for unit in units:
        total += unit.counts()
    on_progress(total)
    left = [unit for unit in units if not unit.done]
    if workers == 1:
        for unit in left:
            for counts in _run_unit(folder, unit, settings):
                total += counts
                on_progress(total)
        return
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(reports, threads, os.getpid())
    ) as pool:
        pending = {pool.submit(_unit_in_worker, folder, unit, settings) for unit in left}
        try:
            while pending:
                done, pending = wait(pending, _WAIT, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                while not reports.empty():
                    total += reports.get()
                on_progress(total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_reports: Any = None
_parent = 0


def _start_worker(reports: Any, threads: int, parent: int) -> None:
    global _reports, _parent
    _reports, _parent = reports, parent
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizer, read when it is first used
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _unit_in_worker(folder: Path, unit: _Unit, settings: Settings) -> None:
    try:
        for counts in _run_unit(folder, unit, settings):
            if os.getppid() != _parent:  # nobody waits any more
                os._exit(1)
            _reports.put(counts)
    except NotText as error:  # its kind does not travel between processes
        raise ValueError(str(error)) from None


def _run_unit(folder: Path, unit: _Unit, settings: Settings) -> Iterator[Counts]:
    """Tokenise a unit from where it stands; yields what each step added."""
    tokenizer = load_tokenizer(folder)
    dtype, end = token_dtype(tokenizer.vocab_size), [tokenizer.eos_token_id]
    parts: dict[str, list[Array]] = {part: [] for part in PARTS}
    text_bytes = dict.fromkeys(PARTS, 0)

    def write(consumed: int, done: bool) -> None:
        number = len({shard.name.rpartition("-")[2] for shard in unit.shards})
        contents: dict[Path, Any] = {}
        made = []
        for part in PARTS:
            if parts[part]:
                name = f"{part}-{unit.number:05d}-{number:04d}"
                shard, files = shard_files(folder, name, part, parts[part], text_bytes[part])
                contents |= files
                made.append(shard)
            parts[part], text_bytes[part] = [], 0
        unit.shards, unit.consumed, unit.done = (*unit.shards, *made), consumed, done
        write_files({**contents, unit.path(folder): unit.text()})  # the progress last

    consumed, unwritten = unit.consumed, 0
    with ThreadPoolExecutor(1) as reader:
        batches = _batches(unit, settings)
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)  # read while these are tokenised
            added = 0
            encoded = tokenizer.encode_batch([one.text for one in batch.documents])
            for one, ids in zip(batch.documents, encoded, strict=True):
                part = PARTS[one.held_out]
                parts[part].append(np.concatenate([ids, end]).astype(dtype))
                text_bytes[part] += one.num_bytes
                added += len(ids) + 1
            consumed, unwritten = consumed + batch.read, unwritten + added
            if unwritten >= settings.shard_tokens:
                write(consumed, done=False)
                unwritten = 0
            yield Counts(len(batch.documents), added, sum(one.num_bytes for one in batch.documents))
    write(consumed, done=True)


class _Document(NamedTuple):
    text: str
    num_bytes: int
    held_out: bool


class _Batch(NamedTuple):
    documents: list[_Document]  # without empty ones
    read: int  # with them


def _batches(unit: _Unit, settings: Settings) -> Iterator[_Batch]:
    """Documents that are tokenised together, without those that the unit has consumed."""
    threshold = settings.validation * 2**64
    batch: list[_Document] = []
    chars = read = 0
    for text in _texts(unit, settings):
        read += 1
        if text:
            data = text.encode()
            batch.append(_Document(text, len(data), content_hash(data) < threshold))
            chars += len(text)
        if chars >= BATCH_CHARS:
            yield _Batch(batch, read)
            batch, chars, read = [], 0, 0
    if read:
        yield _Batch(batch, read)


def _texts(unit: _Unit, settings: Settings) -> Iterator[str]:
    if unit.documents is None:
        yield from islice(_texts_of_files(unit.files, settings), unit.consumed, None)
        return
    documents, skipped = unit.documents, unit.consumed
    if skipped and hasattr(documents, "skip"):
        rest: Iterable[str | Mapping[str, Any]] = documents.skip(skipped)
    else:
        rest = islice(documents, skipped, None)
    for number, one in enumerate(rest, skipped):
        where = f"document {number}"
        if isinstance(one, str):
            yield whole(one, where, settings.errors)
        else:
            record = dict(one) if isinstance(one, Mapping) else one
            yield text_of(record, settings.text_field, where, settings.errors)


def _texts_of_files(files: Iterable[DataFile], settings: Settings) -> Iterator[str]:
    for file in files:
        try:
            yield from documents_of(file, settings.text_field, settings.errors)
        except NotText:
            if file.named:
                raise
