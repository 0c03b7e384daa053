"""Tensors out of files written by `torch.save`, read through the allow-list of `pickles`."""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopmdm import pickles
from loopmdm.pickles import Storage, StoredTensor

# First object of the format that torch.save wrote before version 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class TorchFile:
    """A `torch.save` file: `root` is its object tree, `tensor` reads the data of one leaf of it.

    Only the tensors that are asked for are read, so the weights of a training checkpoint come without its
    optimizer state. Close it after use.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = self.path.open("rb")
        self._zip: zipfile.ZipFile | None = None
        self._legacy: dict[str, tuple[int, int]] = {}
        try:
            is_zip = self._file.read(4) == b"PK\x03\x04"
            self.root: Any = self._open_zip() if is_zip else self._open_legacy()
        except pickles.UnsafePickleError as error:
            self.close()
            raise pickles.UnsafePickleError(f"{self.path}: {error}") from error
        except Exception as error:  # zipfile fails in many ways on damaged archives
            self.close()
            raise ValueError(f"{self.path} cannot be read as a torch file: {error}") from error

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
        self._file.close()

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor's values, in the file's dtype."""
        _check_layout(self.path, stored)
        if stored.storage.numel == 0:
            return torch.empty(stored.shape, dtype=stored.storage.dtype)
        flat = torch.frombuffer(bytearray(self._storage_bytes(stored.storage)), dtype=stored.storage.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    def _open_zip(self) -> Any:
        archive = self._zip = zipfile.ZipFile(self._file)
        names = archive.namelist()
        roots = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"the archive holds {len(roots)} files named data.pkl, a torch file holds one")
        self._prefix = roots[0].removesuffix("data.pkl")
        byte_order = self._prefix + "byteorder"
        if byte_order in names and self._member(byte_order).decode() != sys.byteorder:
            raise ValueError(
                f"it was written on a machine of another byte order than this one ({sys.byteorder})"
            )
        return pickles.load(io.BytesIO(self._member(roots[0])))

    def _open_legacy(self) -> Any:
        size = self.path.stat().st_size
        if size < 16:
            raise ValueError(f"it has {size} bytes: empty or truncated")
        file = self._file
        file.seek(0)
        try:
            magic = pickles.load(file)
        except pickles.UnsafePickleError:
            raise
        except ValueError:
            magic = None
        if magic != _LEGACY_MAGIC:
            raise ValueError("neither a zip archive (truncated or damaged?) nor the older torch format")
        pickles.load(file)  # protocol version
        pickles.load(file)  # type sizes of the writer
        storages: dict[str, Storage] = {}
        root = pickles.load(file, storages)
        keys = pickles.load(file)
        for key in keys if isinstance(keys, list) else []:
            header = file.read(8)
            if not isinstance(key, str) or key not in storages or len(header) < 8:
                raise ValueError(f"the data of storage {key!r} is missing or belongs to no tensor")
            (numel,) = struct.unpack("<q", header)
            length = numel * storages[key].dtype.itemsize
            if not 0 <= length <= size - file.tell():
                raise ValueError(f"storage {key!r} is cut off: the file is truncated")
            self._legacy[key] = (file.tell(), length)
            file.seek(length, 1)
        return root

    def _storage_bytes(self, storage: Storage) -> bytes:
        expected = storage.numel * storage.dtype.itemsize
        try:
            if self._zip is not None:
                data = self._member(f"{self._prefix}data/{storage.key}")
            else:
                start, length = self._legacy[storage.key]
                self._file.seek(start)
                data = self._file.read(length)
        except Exception as error:  # as above
            raise ValueError(
                f"{self.path}: the data of storage {storage.key!r} is missing or damaged: {error}"
            ) from error
        if len(data) != expected:
            raise ValueError(
                f"{self.path}: storage {storage.key!r} has {len(data)} bytes, its tensors need {expected}"
            )
        return data

    def _member(self, name: str) -> bytes:
        assert self._zip is not None
        info = self._zip.getinfo(name)
        # torch.save never compresses; a compressed member could expand without bound.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise zipfile.BadZipFile(f"member {name} is compressed, which torch.save never does")
        return self._zip.read(info)


def _check_layout(path: Path, stored: StoredTensor) -> None:
    """Refuse a tensor that reaches outside its storage, or repeats elements to pose few bytes as many."""
    storage, offset, shape, stride = stored
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(
            f"{path}: a tensor has an invalid layout: offset {offset}, shape {shape}, stride {stride}"
        )
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if count else 0
    if count > storage.numel or last >= max(storage.numel, 1):
        raise ValueError(
            f"{path}: a tensor of shape {shape} does not fit into its storage of {storage.numel} elements"
        )
