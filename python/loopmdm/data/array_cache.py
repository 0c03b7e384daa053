"""Arrays kept on disk under a key, with checksums: what is damaged or half-written is made again."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loopmdm.printable import printable
from loopmdm_kernels.files import write_files
from loopmdm_kernels.values import parse_json

Array: TypeAlias = NDArray[Any]


def cached_arrays(
    folder: Path, key: str, names: Collection[str], make: Callable[[], dict[str, Array]]
) -> dict[str, Array]:
    """The arrays `names` stored under `key`, memory-mapped; made and written first if missing or damaged.

    An entry is KEY.json with the checksums of one KEY.NAME.npy an array. Arrays of size 0 are not stored.

    Raises:
        OSError: the entry cannot be written (full disk, permissions); no partial file is left.
    """
    index = folder / f"{key}.json"
    if index.exists():
        try:
            checksums = parse_json(index.read_text(encoding="utf-8"))
            if not isinstance(checksums, dict) or set(checksums) != set(names):
                raise ValueError(f"it does not hold one checksum each of {', '.join(names)}")
            return {name: _read(_path(index, name), checksum) for name, checksum in checksums.items()}
        except Exception as error:  # numpy's of a damaged header are of many kinds
            warnings.warn(f"{index} is damaged and made again: {printable(error)}", stacklevel=3)
    arrays = make()
    if all(array.size for array in arrays.values()):
        checksums = {name: _checksum(array) for name, array in arrays.items()}
        writers = {_path(index, name): _writer(array) for name, array in arrays.items()}
        # The index last: an entry without it does not exist.
        write_files({**writers, index: json.dumps(checksums)})
    return arrays


def _path(index: Path, name: str) -> Path:
    return index.with_name(f"{index.stem}.{name}.npy")


def _read(path: Path, checksum: int) -> Array:
    array: Array = np.lib.format.open_memmap(path, mode="r")  # np.load also opens archives
    if _checksum(array) != checksum:
        raise ValueError(f"{path.name} does not have its checksum")
    return array


def _checksum(array: Array) -> int:
    layout = f"{array.dtype.str} {array.shape}"  # the same bytes in another shape are other data
    return zlib.crc32(array.data.cast("B"), zlib.crc32(layout.encode()))


def _writer(array: Array) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    return write
