"""Tensors out of files written by `torch.save`, read through the allow-list of `pickles`."""

from __future__ import annotations

import math
import mmap
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopmdm.formats import pickles
from loopmdm.formats.pickles import Storage, StoredTensor
from loopmdm.printable import printable, shown

# First object of the format that torch.save wrote before version 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# Different views of one storage may repeat its elements this often: weights beside their flat buffer, parts
# beside their whole. More would pose a small file as a large model.
_MAX_REPEATS = 4
_MOST_DIMENSIONS = 64  # of torch's tensors


class TorchFile:
    """A `torch.save` file: `root` is its object tree, `tensor` gives the data of one leaf of it.

    The file is mapped: only the tensors that are asked for are read, and tensors share the memory of their
    storage as they did when they were saved. Close it after use; tensors stay valid.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = printable(path)
        # Where the data of a storage lies, by its key: (start, length in bytes, CRC-32 or 0 if not computed).
        self._places: dict[str, tuple[int, int, int]] = {}
        self._flat: dict[str, Tensor] = {}
        self._layouts: dict[str, set[StoredTensor]] = {}
        self._repeated: dict[str, int] = {}
        with self.path.open("rb") as file:
            try:
                self._size = self.path.stat().st_size
                if self._size < 16:
                    raise ValueError(f"it has {self._size} bytes: not a torch file, or truncated")
                # Private pages: what writes to a tensor does not write to the file.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                is_zip = self._data[:4] == b"PK\x03\x04"
                self.root: Any = self._open_zip(file) if is_zip else self._open_legacy()
            except pickles.UnsafePickleError as error:
                raise pickles.UnsafePickleError(f"{self.name}: {error}") from error
            except Exception as error:  # zipfile fails in many ways on damaged archives
                raise ValueError(f"{self.name} cannot be read as a torch file: {printable(error)}") from error

    def close(self) -> None:
        """Let go of the file; its memory is kept by the tensors that were taken from it."""
        self._flat.clear()
        del self._data

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor's values, in the file's dtype; equal records give views of the same memory."""
        storage = stored.storage
        _check_layout(self.name, stored)
        self._check_repeats(stored)
        try:
            if storage.numel == 0:
                return torch.empty(stored.shape, dtype=storage.dtype)
            if storage.key not in self._flat:
                self._flat[storage.key] = self._map(storage)
            return self._flat[storage.key].as_strided(stored.shape, stored.stride, stored.offset)
        except RuntimeError as error:  # sizes beyond what torch can count, beside a size of 0
            raise ValueError(f"{self.name}: a tensor has an invalid layout: {printable(error)}") from error

    def _check_repeats(self, stored: StoredTensor) -> None:
        layouts = self._layouts.setdefault(stored.storage.key, set())
        if stored in layouts:
            return
        layouts.add(stored)
        key, count = stored.storage.key, math.prod(stored.shape)
        self._repeated[key] = self._repeated.get(key, 0) + count
        if self._repeated[key] > _MAX_REPEATS * stored.storage.numel:
            raise ValueError(
                f"{self.name}: tensors repeat the {stored.storage.numel} elements of storage "
                f"{printable(key)} more than {_MAX_REPEATS} times"
            )

    def _open_zip(self, file: Any) -> Any:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise ValueError("the archive holds two files of one name")
        roots = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"the archive holds {len(roots)} files named data.pkl, a torch file holds one")
        places = self._members(list(members.values()))
        prefix = roots[0].removesuffix("data.pkl")
        byte_order = prefix + "byteorder"
        if byte_order in places and self._read(*places[byte_order]) != sys.byteorder.encode():
            raise ValueError(
                f"it was written on a machine of another byte order than this one ({sys.byteorder})"
            )
        for name, place in places.items():
            if name.startswith(prefix + "data/"):
                self._places[name.removeprefix(prefix + "data/")] = place
        start, length, checksum = places[roots[0]]
        self._check(start, length, checksum)
        root, _ = pickles.parse(self._data, start, start + length)
        return root

    def _members(self, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int, int]]:
        """Where the members of the archive lie, in pieces of the file that do not overlap."""
        places = {}
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            # torch.save never compresses; a compressed member could expand without bound.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"member {info.filename} is compressed, which torch.save never does")
            offset = info.header_offset
            if not end <= offset <= self._size - _LOCAL_HEADER.size:
                raise ValueError(f"member {info.filename} overlaps another or lies outside the file")
            signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(self._data, offset)
            start = offset + _LOCAL_HEADER.size + name_length + extra_length
            end = start + info.file_size
            if signature != b"PK\x03\x04" or end > self._size:
                raise ValueError(f"member {info.filename} has a damaged header or is cut off")
            places[info.filename] = (start, info.file_size, info.CRC)
        return places

    def _open_legacy(self) -> Any:
        position = 0

        def read(storages: dict[str, Storage] | None = None) -> Any:
            nonlocal position
            value, position = pickles.parse(self._data, position, self._size, storages)
            return value

        try:
            magic = read()
        except pickles.UnsafePickleError:
            raise
        except ValueError:
            magic = None
        if type(magic) is not int or magic != _LEGACY_MAGIC:
            raise ValueError("neither a zip archive (truncated or damaged?) nor the older torch format")
        read()  # protocol version
        read()  # type sizes of the writer
        storages: dict[str, Storage] = {}
        root = read(storages)
        keys = read()
        for key in keys if isinstance(keys, list) else []:
            header = self._data[position : position + 8]
            if type(key) is not str or key not in storages or key in self._places or len(header) < 8:
                raise ValueError(f"the data of storage {key!r} is missing, repeated or belongs to no tensor")
            (numel,) = struct.unpack("<q", header)
            position += 8
            length = numel * storages[key].dtype.itemsize
            if not 0 <= length <= self._size - position:
                raise ValueError(f"storage {key!r} is cut off: the file is truncated")
            self._places[key] = (position, length, 0)
            position += length
        return root

    def _map(self, storage: Storage) -> Tensor:
        """The elements of a storage, in the memory of the file where they are aligned."""
        key = printable(storage.key)
        expected = storage.numel * storage.dtype.itemsize
        if storage.key not in self._places:
            raise ValueError(
                f"{self.name}: the data of storage {key!r} is missing or damaged: no such member"
            )
        start, length, checksum = self._places[storage.key]
        if length != expected:
            raise ValueError(f"{self.name}: storage {key!r} has {length} bytes, its tensors need {expected}")
        try:
            self._check(start, length, checksum)
        except ValueError as error:
            raise ValueError(
                f"{self.name}: the data of storage {key!r} is missing or damaged: {error}"
            ) from error
        if start % storage.dtype.itemsize:
            return torch.frombuffer(bytearray(self._data[start : start + length]), dtype=storage.dtype)
        return torch.frombuffer(self._data, dtype=storage.dtype, count=storage.numel, offset=start)

    def _check(self, start: int, length: int, checksum: int) -> None:
        # 0: torch.serialization.set_crc32_options(False) was in force.
        if checksum and zlib.crc32(memoryview(self._data)[start : start + length]) != checksum:
            raise ValueError("its bytes do not have the CRC-32 that the archive states")

    def _read(self, start: int, length: int, checksum: int) -> bytes:
        self._check(start, length, checksum)
        return self._data[start : start + min(length, 64)]


def _check_layout(name: str, stored: StoredTensor) -> None:
    """Refuse a tensor that reaches outside its storage, or repeats elements to pose few bytes as many."""
    storage, offset, shape, stride = stored
    if max(len(shape), len(stride)) > _MOST_DIMENSIONS:  # whose products may take for ever
        raise ValueError(f"{name}: a tensor of {len(shape)} dimensions, at most {_MOST_DIMENSIONS} are read")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        layout = f"offset {shown(offset)}, shape {shown(shape)}, stride {shown(stride)}"
        raise ValueError(f"{name}: a tensor has an invalid layout: {layout}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if count else 0
    if count > storage.numel or last >= max(storage.numel, 1):
        raise ValueError(
            f"{name}: a tensor of shape {printable(shape)} does not fit into its storage of "
            f"{storage.numel} elements"
        )
