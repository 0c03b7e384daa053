"""Training on a corpus while it is being tokenised: shards are read in the order in which they come."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from loopmdm.data.corpus.build import PLAN_FILE, Counts, Documents, Settings, build_corpus, finished_shards
from loopmdm.data.corpus.data import CorpusRows, Rows
from loopmdm.data.corpus.order import shuffled
from loopmdm.data.corpus.store import INDEX_FILE, Corpus, Index, Shard, is_corpus, read_index
from loopmdm.data.files import Found
from loopmdm.data.packing import TextData
from loopmdm.data.tokenizer import Tokenizer, load_tokenizer
from loopmdm_kernels.locks import LockedError
from loopmdm_kernels.values import check_at_least

WINDOW = 2**13  # sequences that are shuffled among themselves on the first way through
SHARD_TOKENS = 2**22  # of a build that somebody waits for
_WINDOWS = -2  # keeps the order within windows apart from that of epochs and mixtures
_LOOK = 0.05  # seconds between two looks at the build
_PATIENCE = 30  # seconds to wait for a build that has lost its parent


class GrowingCorpus(Corpus):
    """A corpus that a build still adds to; what is there is the beginning of the finished one.

    Attributes:
        finished: whether the build is done.
    """

    def __init__(self, folder: str | Path, check: Callable[[], None] | None = None) -> None:
        """Open the folder of a build, and wait for its beginning.

        Args:
            folder: that `build_corpus` writes to, in another thread or process.
            check: called while there is something to wait for; raises if the build has failed. None: nobody
                builds, so there is nothing to wait for.

        Raises:
            FileNotFoundError: nobody builds, and the folder holds no beginning of a corpus.
        """
        self.folder, self._check, self.finished = Path(folder), check, False
        while not (is_corpus(self.folder) or (self.folder / PLAN_FILE).exists()):
            if check is None:
                raise FileNotFoundError(f"{folder} holds no corpus, and no beginning of one")
            check()
            time.sleep(_LOOK)
        tokenizer = load_tokenizer(self.folder)
        self._open(Index(tokenizer.fingerprint, tokenizer.vocab_size, ()))
        self.grow()

    def grow(self) -> None:
        """Take the shards that were finished since the last call."""
        if self.finished:
            return
        shards: list[Shard] = []
        with suppress(FileNotFoundError):  # a build removes its notes after it has written the index
            shards = finished_shards(self.folder)
        if is_corpus(self.folder):
            self._take(read_index(self.folder / INDEX_FILE))
            self.finished = True
        elif len(shards) > len(self.index.shards):
            self._take(Index(self.index.tokenizer, self.index.vocab_size, tuple(shards)))

    def wait_for(self, enough: Callable[[], bool]) -> None:
        """Return when there is enough, or nothing more to come.

        Raises:
            ValueError: there is more to come, and nobody builds.
        """
        self.grow()
        while not (enough() or self.finished):
            if self._check is None:
                raise ValueError(f"{self.folder} is an unfinished corpus that nobody goes on building")
            try:
                self._check()
            except Exception:
                self.grow()  # what it has finished before it failed
                if enough():
                    return
                raise
            time.sleep(_LOOK)
            self.grow()

    def beginning(self, part: str, length: int) -> Corpus:
        """The shards up to the first one of a part that holds a sequence; the same at any time.

        part: "train" or "validation".
        """
        found: list[int] = []

        def look() -> bool:
            sizes = [s.tokens if s.part == part else 0 for s in self.index.shards]
            found[:] = [i for i, size in enumerate(sizes) if size >= length - 2][:1]
            return bool(found)

        self.wait_for(look)
        shards = self.index.shards[: found[0] + 1] if found else ()
        return _Beginning(self, shards)


class _Beginning(Corpus):
    def __init__(self, corpus: GrowingCorpus, shards: tuple[Shard, ...]) -> None:
        self.folder = corpus.folder
        self._open(Index(corpus.index.tokenizer, corpus.index.vocab_size, shards))


class StreamData(TextData):
    """The sequences of a corpus that is still being tokenised, and the batches drawn from them.

    The first way through keeps the order of the documents, but for windows of 8192 sequences which are
    shuffled; a batch waits until its window is there. Later epochs are shuffled as a whole. The order is a
    function of the position, whatever the speed of the build: a run that is resumed, also on another number
    of ranks with the same global batch, sees the sequences that it would have seen.
    """

    tokens: CorpusRows

    def __init__(
        self,
        corpus: GrowingCorpus,
        length: int,
        *,
        seed: int = 0,
        accumulation: int = 1,
        batch_size: int = 32,
        window: int = WINDOW,
    ) -> None:
        """Wait for the first sequence.

        Args:
            corpus: that grows.
            length: L, tokens of a sequence with BOS and EOS.
            seed, accumulation, batch_size: as in `TextData`.
            window: sequences that are shuffled among themselves.

        Raises:
            ValueError: the build has ended without a sequence of this length.
        """
        check_at_least("window", window, 1)
        self.corpus, self._window, self._lock = corpus, window, threading.Lock()
        self._index: Index | None = None  # that `tokens` were made of
        corpus.beginning("train", length)
        rows = CorpusRows([corpus], "train", length)
        if not len(rows):
            raise ValueError(
                f"the train part of {corpus.folder} holds no sequence of length {length}: give more text or a"
                " smaller length"
            )
        super().__init__(
            rows,
            vocab_size=corpus.index.vocab_size,
            mask_token_id=corpus.tokenizer.mask_token_id,
            seed=seed,
            accumulation=accumulation,
            batch_size=batch_size,
        )

    def _rows_at(self, start: int, count: int) -> Rows:
        with self._lock:
            size = self._read_to(-(-(start + count) // self._window) * self._window)
        epochs, places = np.divmod(np.arange(start, start + count), size)
        windows, within = np.divmod(places, self._window)
        rows = np.empty(count, np.int64)
        for window in np.unique(windows[epochs == 0]).tolist():
            first = window * self._window
            chosen = (epochs == 0) & (windows == window)
            number = np.full(int(chosen.sum()), window, np.int64)
            most = min(self._window, size - first)
            rows[chosen] = first + shuffled(within[chosen], most, self.seed, _WINDOWS, number)
        later = epochs > 0
        rows[later] = shuffled(places[later], size, self.seed, 0, epochs[later])
        return rows

    def _read_to(self, wanted: int) -> int:
        """Sequences that there are: as many as wanted, or all."""

        def enough() -> bool:
            if self.corpus.index is not self._index:
                self._index = self.corpus.index
                self.tokens = CorpusRows([self.corpus], "train", self.length)
            return len(self.tokens) >= wanted

        self.corpus.wait_for(enough)
        enough()
        return len(self.tokens)


class CorpusStream:
    """A build beside the training, and the corpus that grows by it.

    Files are read and tokenised in a process of their own, which ends with this one; anything else in a
    thread.

    Attributes:
        corpus: for `StreamData`.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        folder: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        made_of: dict[str, Any] | None = None,
    ) -> None:
        """Begin to tokenise documents into a folder, or go on, or open what is finished.

        The tokens stay on disk, as the corpus of `build_corpus`: a resumed run tokenises nothing twice, and
        the next one finds them.

        Args:
            documents, tokenizer, folder, made_of: as in `build_corpus`. A script that gives files needs the
                usual `if __name__ == "__main__":`.
            settings: of the documents and the split; None: those of `Settings` with shards of 4 M tokens.

        Raises:
            ValueError: the folder holds a corpus of another tokenizer; otherwise as `build_corpus`, here or
                where a batch waits for a sequence.
        """
        self._builder: _Builder | None = None
        if is_corpus(Path(folder)):
            other = read_index(Path(folder) / INDEX_FILE).tokenizer
            if other != tokenizer.fingerprint:
                raise ValueError(f"{folder} holds a corpus that was made with another tokenizer")
        else:
            settings = settings or Settings(shard_tokens=SHARD_TOKENS)
            self._builder = _Builder(documents, tokenizer, Path(folder), settings, made_of)
        self.corpus = GrowingCorpus(Path(folder), self._check)

    def _check(self) -> None:
        if self._builder is not None:
            self._builder.check()

    def close(self) -> None:
        """Stop the build; it goes on when it is begun again."""
        if self._builder is not None:
            self._builder.close()

    def __enter__(self) -> CorpusStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stopped(Exception):
    pass


class _Builder:
    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        folder: Path,
        settings: Settings,
        made_of: dict[str, Any] | None,
    ) -> None:
        self._folder = folder
        self._error: Exception | None = None
        context = multiprocessing.get_context("spawn")
        self._reports, reports = context.Pipe(duplex=False)
        self._stop = context.Event()
        arguments = (documents, tokenizer, folder, settings, made_of)
        self._worker: threading.Thread | multiprocessing.process.BaseProcess
        if isinstance(documents, Found):
            worker = context.Process(
                target=_build, args=(os.getpid(), reports, self._stop, *arguments), daemon=True
            )
            worker.start()
            reports.close()
            self._worker = worker
        else:
            self._worker = threading.Thread(target=_build, args=(None, reports, self._stop, *arguments))
            self._worker.daemon = True
            self._worker.start()
        begun = False
        while not begun:  # what is raised later concerns those who wait for more
            begun = self._report(_LOOK)

    def check(self) -> None:
        """Raise what the build has raised."""
        self._report(0.0)

    def _report(self, wait: float) -> bool:
        """Whether the build has said that it has begun, since the last call."""
        alive = self._worker.is_alive()  # before its last report is read
        with suppress(EOFError):
            if self._error is None and self._reports.poll(wait):
                self._error = self._reports.recv()
                if self._error is None:
                    return True
        if self._error is not None:
            raise self._error
        if not alive and not is_corpus(self._folder) and not self._stop.is_set():
            raise RuntimeError(f"the process that tokenises into {self._folder} was ended from outside")
        return False

    def close(self) -> None:
        self._stop.set()
        self._worker.join()


def _build(parent: int | None, reports: Any, stop: Any, *arguments: Any) -> None:
    """Build a corpus; report None when it has begun, and the error if it fails."""
    documents, tokenizer, folder, settings, made_of = arguments
    begun = False

    def look(_: Counts) -> None:
        nonlocal begun
        if not begun:
            reports.send(None)
            begun = True
        if stop.is_set():
            raise _Stopped
        if parent is not None and os.getppid() != parent:  # nobody waits any more
            os._exit(1)

    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    try:
        for left in range(_PATIENCE, -1, -1):
            try:
                build_corpus(
                    documents, tokenizer, folder, settings, workers=1, made_of=made_of, on_progress=look
                )
                break
            except LockedError:  # by the build of a run that was killed, which ends after its present batch
                if not left or stop.is_set():
                    raise
                time.sleep(1)
    except _Stopped:
        pass
    except Exception as error:
        reports.send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return ValueError(str(error))
