"""safetensors files with a digest of every byte, and with tied tensors written once.

The header's metadata holds `loopmdm_digest`: BLAKE2b of the whole file with the digest's own digits as zeros.
Files of other writers have none and are read as they are. A tensor that is the same memory as another one
is not written; as in `safetensors.torch.save_model`, metadata names the tensor that stands for it.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopmdm.printable import printable

DIGEST_KEY = "loopmdm_digest"
_PREFIX = "blake2b-256:"
_DIGITS = 64
_PLACEHOLDER = _PREFIX + "0" * _DIGITS


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, each piece of memory once, and the digest. Raises an `OSError` on a full disk, say."""
    unique, aliases = _unique(tensors)
    header = {**metadata, **aliases, DIGEST_KEY: _PLACEHOLDER}
    try:
        save_file(unique, path, metadata=header)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        place = 8 + file.read(size).index(_PLACEHOLDER.encode()) + len(_PREFIX)
        digest = _digest(file.fileno(), place)
        file.seek(place)
        file.write(digest.encode())


def check(path: Path) -> bool:
    """Whether the file states a digest. Raises a `ValueError` if it is not that of the file's bytes."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{printable(path)} is not a whole safetensors file: {printable(error)}") from error
    # Either mark alone is enough, so that damage to one of them does not pass for a file without a digest.
    stated = {key: value for key, value in metadata.items() if key == DIGEST_KEY or value.startswith(_PREFIX)}
    if not stated:
        return False
    value = stated.get(DIGEST_KEY, "").encode("utf-8", "replace")
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        place = 8 + header.find(value) + len(_PREFIX)
        whole = len(stated) == 1 and header.count(value) == 1 and len(value) == len(_PLACEHOLDER)
        if not whole or value.decode() != _PREFIX + _digest(file.fileno(), place):
            raise ValueError(f"{printable(path)} is damaged: its bytes do not have the digest that it states")
    return True


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file whose digest, if stated, is right; tied ones under each name."""
    check(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            tied = aliases(file.metadata(), set(tensors))
            return {**tensors, **{alias: tensors[kept] for alias, kept in tied.items()}}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {printable(error)}") from error


def aliases(metadata: Mapping[str, str] | None, names: set[str]) -> dict[str, str]:
    """Tensors that are not in the file, and which of it stands for each."""
    stated = (metadata or {}).items()
    return {alias: kept for alias, kept in stated if kept in names and alias not in names}


def _unique(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tied = tied_names(tensors)
    unique = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if name not in tied}
    return unique, tied


def tied_names(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Of tensors, or records of stored ones, in the same memory: all but the first, each with the first."""
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        memory = tensor
        if isinstance(tensor, Tensor):
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if 0 in tensor.shape or memory not in first:
            first[memory] = name
        else:
            tied[name] = first[memory]
    return tied


def _digest(descriptor: int, place: int) -> str:
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
        digest = hashlib.blake2b(digest_size=_DIGITS // 2)
        with view[:place] as before, view[place + _DIGITS :] as after:
            digest.update(before)
            digest.update(b"0" * _DIGITS)
            digest.update(after)
        return digest.hexdigest()


def tie(model: torch.nn.Module, tied: Mapping[str, str], source: str) -> None:
    """Make each parameter of `tied` the very parameter that stands for it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for alias, kept in tied.items():
        if alias not in parameters or kept not in parameters:
            raise ValueError(f"{source}: {alias} is tied to {kept}; expected two parameters")
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameters[kept])
