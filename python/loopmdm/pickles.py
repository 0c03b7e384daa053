"""Reading pickles without running them.

A pickle names Python objects by module and attribute and calls them. Here every such name is looked up in a
fixed table and nothing is ever imported:

* tensors become `StoredTensor` records (shape and place of the data, no data),
* plain containers and numbers become themselves,
* objects of libraries that training checkpoints are known to carry (configuration nodes, tokenizers) become
  `Opaque` records, which remember what the file said about them and can do nothing,
* every other name is refused, and the error says which.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import IO, Any, NamedTuple, NoReturn

import torch


class UnsafePickleError(ValueError):
    """The pickle names something outside the allow-list."""


class Storage(NamedTuple):
    """A flat run of `numel` elements of one dtype, named by `key` inside its file."""

    dtype: torch.dtype
    key: str
    numel: int


class StoredTensor(NamedTuple):
    """Where a tensor's data lies: element `offset` of a storage, with the given shape and strides."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Opaque:
    """Stands for an object of an allow-listed library; holds the arguments, state and items of the file."""

    global_name = ""
    args: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    elements: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Any:
        self = super().__new__(cls)
        self.args, self.state, self.entries, self.elements = args, None, {}, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        self.elements.append(value)

    def extend(self, values: list[Any]) -> None:
        self.elements.extend(values)


class Mapping(dict[Any, Any]):
    """A dict that ignores attributes: what OrderedDict, defaultdict and Counter become."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _StorageType(NamedTuple):
    dtype: torch.dtype


class _Function:
    """A callable the pickle may call but not alter: BUILD could set attributes of a plain function."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise UnsafePickleError("the pickle tries to alter a function of the reader")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise UnsafePickleError(f"a tensor is built on {type(storage).__name__}, not on a storage")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise UnsafePickleError(f"a parameter is built on {type(data).__name__}, not on a tensor")
    return data


def _default_mapping(_factory: Any = None, *items: Any) -> Mapping:
    return Mapping(*items)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Protocol 2 writes bytes as text and a call of codecs.encode."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"_codecs.encode is accepted for latin1 text only, got encoding {encoding!r}")
    return text.encode("latin1")


def _empty_bytes(*args: Any) -> bytes:
    if args:
        raise UnsafePickleError("bytes(...) with arguments is refused")
    return b""


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Mapping,
    ("collections", "Counter"): Mapping,
    ("collections", "defaultdict"): _Function(_default_mapping),
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): _StorageType(torch.uint8),
    ("_codecs", "encode"): _Function(_encode),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (dict, list, tuple, set, frozenset, str, int, float, bool, complex)
    },
    # What protocol 2 calls int and str.
    ("__builtin__", "long"): int,
    ("__builtin__", "unicode"): str,
    **{(module, "bytes"): _Function(_empty_bytes) for module in ("builtins", "__builtin__")},
}

# Libraries and names whose objects are kept as inert records. Nothing of them is imported.
_OPAQUE_PACKAGES = frozenset(
    (
        "dataloader",
        "lightning",
        "lightning_fabric",
        "numpy",
        "omegaconf",
        "pathlib",
        "pytorch_lightning",
        "tokenizers",
        "torchmetrics",
        "transformers",
        "typing",
    )
)
_OPAQUE_NAMES = frozenset(
    (
        ("_operator", "getitem"),
        ("collections", "deque"),
        ("functools", "partial"),
        ("operator", "getitem"),
        ("torch", "device"),
        ("torch.torch_version", "TorchVersion"),
    )
)
_ACCEPTED = (
    "accepted are tensors, plain containers and numbers, and inert records for objects of "
    + ", ".join(sorted(_OPAQUE_PACKAGES))
)


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], storages: dict[str, Storage]) -> None:
        super().__init__(file)
        self._storages = storages
        self._opaque: dict[str, type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _GLOBALS.get((module, name))
        if known is not None:
            return known
        if module.partition(".")[0] in _OPAQUE_PACKAGES or (module, name) in _OPAQUE_NAMES:
            full_name = f"{module}.{name}"
            if full_name not in self._opaque:
                self._opaque[full_name] = type("Opaque", (Opaque,), {"global_name": full_name})
            return self._opaque[full_name]
        raise UnsafePickleError(f"the pickle asks for {module}.{name}, which is refused; {_ACCEPTED}")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), _, int(numel)):
                pass
            case ("storage", _StorageType(dtype), str(key), _, int(numel), None):
                pass
            case _:
                raise UnsafePickleError(
                    f"the pickle refers to an outside object of an unknown kind; {_ACCEPTED}"
                )
        storage = self._storages[key] = Storage(dtype, key, numel)
        return storage


def _check_opcodes(file: IO[bytes]) -> None:
    """Walk over one pickle without executing it; leaves `file` just behind it.

    Refuses what `find_class` does not see: registered extension codes (their cache is shared by the whole
    process), and memo indices that would make the unpickler allocate memory far beyond the file's size.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("EXT1", "EXT2", "EXT4"):
            raise UnsafePickleError(
                f"the pickle uses extension code {argument}, which is refused; {_ACCEPTED}"
            )
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument not in range(count + 1):
            raise UnsafePickleError(f"the pickle uses memo index {argument} at instruction {count}")


def load(file: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """Read one pickle from a seekable `file` and leave the file just behind it.

    Returns built-in containers and numbers with `StoredTensor` and `Opaque` leaves; the storages that its
    tensors name are added to `storages`.
    Raises `UnsafePickleError` for a name outside the allow-list and `ValueError` for a damaged pickle.
    """
    start = file.tell()
    try:
        _check_opcodes(file)
        end = file.tell()
        file.seek(start)
        data = io.BytesIO(file.read(end - start))
        return _InertUnpickler(data, {} if storages is None else storages).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged stream can fail inside any opcode
        raise ValueError(f"damaged pickle: {type(error).__name__}: {error}") from error


def lookup(value: Any, *keys: str) -> Any:
    """The plain value at a path through nested dicts and omegaconf records, or None where there is none."""
    for key in keys:
        if isinstance(value, Opaque):
            content = value.state.get("_content") if isinstance(value.state, dict) else None
            value = content if isinstance(content, dict) else value.entries
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, Opaque) and isinstance(value.state, dict):
        value = value.state.get("_val")
    return value if isinstance(value, (bool, int, float, str)) else None
