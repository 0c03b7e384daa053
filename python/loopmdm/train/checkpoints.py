"""Checkpoints in shards: every rank writes its part in the background, and any number of ranks reads them.

`checkpoints/step-00000100/` holds safetensors files in the layout of torch.distributed.checkpoint, and
checkpoint.json with the counters, the configuration and a digest of each file. There is nothing to unpickle.
The folder gets its name when all of it is on the disk, so that it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from loopmdm.formats.folders import read_json
from loopmdm.model.checkpoint import check_same
from loopmdm.train.parallel import Ranks
from loopmdm.train.state import STATE_FILE, CheckpointError, check_ranges, read_metadata
from loopmdm_kernels.files import sync, temporary_path, write_files

CHECKPOINTS = "checkpoints"  # folder of them, in that of the run
FILE = "checkpoint.json"
KEPT = 3
_NAME = re.compile(r"step-(\d{8,})")
_FORMAT = 1
_SHARD = "shard-{:05d}-"  # what torch.distributed.checkpoint begins the names of a rank's files with
_EARLIER = "to continue from an earlier checkpoint remove {}"
_PIECE = 2**22  # bytes that are hashed at once


class Found(NamedTuple):
    """A checkpoint on disk."""

    path: Path  # a folder of shards, or the file of a state
    metadata: dict[str, Any]
    model: dict[str, Any]  # model_type and configuration; empty of a file, beside which they lie

    @property
    def step(self) -> int:
        return int(self.metadata["counters"]["step"])

    @property
    def sharded(self) -> bool:
        return self.path.name != STATE_FILE


class Header(NamedTuple):
    """What checkpoint.json says of a checkpoint."""

    metadata: dict[str, Any]  # as in the file of a state
    model: dict[str, Any]  # model_type, and the configuration
    nll: float | None  # held out, where it was measured at this step


class Checkpoints:
    """Those of one run. Of its calls, each is made by every rank."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        """folder: of the run. keep: newest checkpoints that stay; the one with the best NLL does too."""
        self._folder, self._keep, self._ranks = folder, keep, ranks
        # In a group of its own the writing does not get between the collectives of the training.
        self._group = dist.new_group(backend="gloo") if ranks.distributed else None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, tensors: dict[str, Tensor], header: Header) -> None:
        """Copy the tensors now, and write them while the training goes on."""
        self.wait()
        step = int(header.metadata["counters"]["step"])
        staging = self._folder / f".loopmdm-{step:016x}.tmp"  # one name on all ranks; leftovers look like it
        try:
            if self._ranks.rank == 0:
                staging.mkdir(exist_ok=True)
            write = self._begin(staging, tensors)
        except OSError as error:
            raise _failure(self._folder, error) from error
        self._pending = self._executor.submit(self._finish, write, staging, header)

    def _begin(self, staging: Path, tensors: dict[str, Tensor]) -> Callable[[], object]:
        """Copy the tensors; what is returned waits until they are written."""
        if self._ranks.distributed:
            # Imported where they are needed: it takes half a second.
            from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
            from torch.distributed.checkpoint.state_dict_saver import async_save

            writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
            future: Any = async_save(tensors, storage_writer=writer, process_group=self._group)
            return lambda: future.result()
        from loopmdm.formats import safetensors_files

        copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        name = _SHARD.format(1) + "model-00001-of-00001.safetensors"
        return lambda: safetensors_files.write(staging / name, copies, {})

    def _finish(self, write: Callable[[], object], staging: Path, header: Header) -> None:
        try:
            write()
            self._publish(staging, header)
        except BaseException:
            if self._ranks.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _publish(self, staging: Path, header: Header) -> None:
        sums = {}
        for path in sorted(staging.glob(_SHARD.format(self._ranks.rank + 1) + "*")):
            sync(path)
            sums[path.name] = _digest(path)
        if self._ranks.distributed:
            gathered: list[Any] = [None] * self._ranks.world_size
            dist.all_gather_object(gathered, sums, group=self._group)
            sums = {name: digest for part in gathered for name, digest in part.items()}
        if self._ranks.rank:
            return
        write_files(
            {
                staging / FILE: json.dumps({"format": _FORMAT, **header._asdict(), "files": sums}, indent=1)
                + "\n"
            }
        )
        target = self._folder / CHECKPOINTS / f"step-{header.metadata['counters']['step']:08d}"
        target.parent.mkdir(exist_ok=True)
        os.replace(staging, target)
        sync(target.parent)
        self._prune()

    def _prune(self) -> None:
        nlls = _nlls(self._folder)
        best = best_nll(self._folder)
        for path in list(nlls)[: -self._keep]:
            if nlls[path] is None or nlls[path] != best:
                _remove(self._folder, path)

    def wait(self) -> None:
        """Until what was begun is on the disk.

        Raises:
            CheckpointError: it could not be written; the previous ones are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            _result(self._folder, pending)

    def check(self) -> None:
        """Raise now what `wait` would raise, if it has happened already."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """End the thread, when nothing is written any more: the folder of the run is free then.

        Warns:
            UserWarning: what was begun could not be written, and another error has come before `wait`.
        """
        self._executor.shutdown()
        try:
            self.wait()
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)


def load(found: Found, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Read a sharded checkpoint into the tensors, which may be split in another way; every rank calls it.

    Raises:
        ValueError: damaged, or of another model.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    files = read_json(found.path / FILE)["files"]
    ranks.refuse_together(_damage(found.path, files, sorted(files)[ranks.rank :: ranks.world_size]))
    reader = HuggingFaceStorageReader(str(found.path))
    stored = reader.read_metadata().state_dict_metadata
    shapes = {name: tuple(getattr(one, "size", ())) for name, one in stored.items()}
    check_same({name: tuple(value.shape) for name, value in tensors.items()}, shapes, str(found.path))
    _read_into(tensors, reader)


def read_averaged(found: Found) -> dict[str, Tensor]:
    """The whole tensors of the model of a sharded checkpoint, averaged where they are; in a single process.

    Raises:
        ValueError: a file is damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    files = read_json(found.path / FILE)["files"]
    complaint = _damage(found.path, files, sorted(files))
    if complaint:
        raise ValueError(complaint)
    reader = HuggingFaceStorageReader(str(found.path))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    # By the names in the model: the average, where there is one, comes after the weight.
    kept = {
        name.partition(".")[2]: name
        for kind in ("model.", "ema.")
        for name in stored
        if name.startswith(kind)
    }
    tensors = {
        name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in kept.values()
    }
    _read_into(tensors, reader)
    return {name: tensors[source] for name, source in kept.items()}


def _read_into(tensors: dict[str, Tensor], reader: Any) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    with torch.no_grad(), warnings.catch_warnings():
        # In a single process it says that it is one.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(tensors, storage_reader=reader)


def newest(folder: Path) -> Found | None:
    """The checkpoint of a run with the most steps, of either form.

    Raises:
        ValueError: it is damaged.
    """
    found = [_read(path) for path in _steps(folder)[-1:]]
    state = folder / STATE_FILE
    if state.exists():
        found.append(Found(state, read_metadata(state), {}))
    return max(found, key=lambda one: one.step, default=None)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one to continue from."""
    return (folder / STATE_FILE).exists() or bool(_steps(folder))


def best_nll(folder: Path) -> float | None:
    """The lowest held-out NLL of the sharded checkpoints of a run."""
    return min((nll for nll in _nlls(folder).values() if nll is not None), default=None)


def _nlls(folder: Path) -> dict[Path, float | None]:
    """The sharded checkpoints of a run, by their steps, with what was measured at them."""
    return {path: read_json(path / FILE).get("nll") for path in _steps(folder)}


def _steps(folder: Path) -> list[Path]:
    """The sharded checkpoints of a run, by their steps."""
    paths = [path for path in (folder / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.partition("-")[2]))


def _read(path: Path) -> Found:
    try:
        values = read_json(path / FILE)
        if values.get("format") != _FORMAT or set(values) != {"format", *Header._fields, "files"}:
            raise ValueError(f"{path / FILE} was not written by this version of loopmdm, or is damaged")
        check_ranges(path, values["metadata"])
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; {_EARLIER.format(path)}") from error
    return Found(path, values["metadata"], values["model"])


def _damage(folder: Path, files: dict[str, str], names: list[str]) -> str | None:
    for name in names:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing; {_EARLIER.format(folder)}"
        if _digest(path) != files[name]:
            return f"{path} is damaged: its bytes do not have the digest in {FILE}; {_EARLIER.format(folder)}"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _remove(folder: Path, path: Path) -> None:
    """Take a checkpoint away under its name first, so that none is ever there in part."""
    leaving = temporary_path(folder)
    os.replace(path, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _result(folder: Path, pending: Future[None]) -> None:
    # Not raised by `result`: a failure on several ranks is no Exception, like an interruption of the wait.
    error = pending.exception()
    if error is not None:
        raise _failure(folder, error) from error


def _failure(folder: Path, error: BaseException) -> CheckpointError:
    # Of a failure on several ranks torch.distributed.checkpoint tells all; the first says enough.
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return CheckpointError(
        f"cannot write a checkpoint in {folder}, the previous ones are intact: {str(error).splitlines()[0]}"
    )
