"""Reading pickles without running them.

A pickle names Python objects by module and attribute and calls them. Here every such name is looked up in a
fixed table and nothing is ever imported:

* tensors become `StoredTensor` records (shape and place of the data, no data),
* plain containers and numbers become themselves,
* objects of libraries that training checkpoints are known to carry (configuration nodes, tokenizers) become
  `Opaque` records, which remember what the file said about them and can do nothing,
* every other name is refused, and the error says which.

`pickle_machine` carries out the instructions, within limits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch

from loopmdm.formats.pickle_machine import (
    MAX_DIGITS,
    Buffer,
    Global,
    Machine,
    Opaque,
    UnsafePickleError,
    check_key,
)
from loopmdm.printable import printable

__all__ = ["Opaque", "Storage", "StoredTensor", "UnsafePickleError", "load", "lookup", "parse"]

_MAX_DIMENSIONS = 64
_SCALARS = (bool, int, float, str)


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


# What a pickle may call: inert stand-ins that take the machine and the arguments of the call.


def _rebuild_tensor(machine: Machine, args: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, stride = args[:4]
    if type(storage) is not Storage:
        raise UnsafePickleError(f"a tensor is built on {type(storage).__name__}, not on a storage")
    for sizes in (shape, stride):
        if type(sizes) is not tuple or len(sizes) > _MAX_DIMENSIONS:
            raise UnsafePickleError(f"a tensor has a shape or stride that is no tuple of {_MAX_DIMENSIONS}")
    if not all(type(number) is int for number in (offset, *shape, *stride)):  # a record may be a key
        raise UnsafePickleError("a tensor has an offset, a shape or a stride that is no whole number")
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_parameter(machine: Machine, args: tuple[Any, ...]) -> StoredTensor:
    if not args or type(args[0]) is not StoredTensor:
        raise UnsafePickleError("a parameter is built on something that is no tensor")
    return args[0]


def _elements(machine: Machine, args: tuple[Any, ...]) -> Any:
    """The one container that a container is made of, paid for."""
    if not args:
        return ()
    if len(args) > 1 or type(args[0]) not in (list, tuple, set, frozenset, dict):
        raise UnsafePickleError("a container is made of something that is no container, which is refused")
    machine.pay(len(args[0]))
    return args[0]


def _list(machine: Machine, args: tuple[Any, ...]) -> list[Any]:
    return list(_elements(machine, args))


def _tuple(machine: Machine, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_elements(machine, args))


def _set(machine: Machine, args: tuple[Any, ...]) -> set[Any]:
    return set(map(check_key, _elements(machine, args)))


def _frozenset(machine: Machine, args: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(map(check_key, _elements(machine, args)))


def _dict(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    items = _elements(machine, args)
    if type(items) is dict:
        return dict(items)
    pairs = {}
    for item in items:
        if type(item) not in (list, tuple) or len(item) != 2:
            raise UnsafePickleError("a dict is made of something that is no pair")
        pairs[check_key(item[0])] = item[1]
    return pairs


def _default_dict(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    return _dict(machine, args[1:])


def _number(kind: Callable[..., Any]) -> Callable[..., Any]:
    def call(machine: Machine, args: tuple[Any, ...]) -> Any:
        if len(args) > 2 or any(type(arg) not in _SCALARS for arg in args):
            raise UnsafePickleError("a number or text is made of something that is no scalar")
        if any(type(arg) is str and len(arg) > MAX_DIGITS for arg in args):
            raise UnsafePickleError(f"a number is made of a text of more than {MAX_DIGITS} characters")
        return kind(*args)

    return call


def _encode(machine: Machine, args: tuple[Any, ...]) -> bytes:
    """Protocol 2 writes bytes as text and a call of codecs.encode."""
    text, encoding = (*args, "latin1")[:2] if args else (None, None)
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError("_codecs.encode is accepted for latin1 text only")
    machine.pay(len(text))
    return text.encode("latin1")


def _empty_bytes(machine: Machine, args: tuple[Any, ...]) -> bytes:
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

_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _default_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _tuple,
    ("_codecs", "encode"): _encode,
    **{
        (module, name): call
        for module in ("builtins", "__builtin__")
        for name, call in {
            "dict": _dict,
            "list": _list,
            "tuple": _tuple,
            "set": _set,
            "frozenset": _frozenset,
            "str": _number(str),
            "int": _number(int),
            "float": _number(float),
            "bool": _number(bool),
            "complex": _number(complex),
            "bytes": _empty_bytes,
        }.items()
    },
    # What protocol 2 calls int and str.
    ("__builtin__", "long"): _number(int),
    ("__builtin__", "unicode"): _number(str),
}
_GLOBALS: dict[tuple[str, str], Any] = {
    **{names: Global(".".join(names), call) for names, call in _CALLS.items()},
    **{("torch", name): Global(f"torch.{name}", value=dtype) for name, dtype in _STORAGE_DTYPES.items()},
    ("torch.storage", "UntypedStorage"): Global("torch.storage.UntypedStorage", value=torch.uint8),
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
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


def _opaque(name: str) -> Global:
    return Global(name, lambda machine, args: Opaque(name, args))


class _Names:
    """The names and storages of one pickle."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self._storages = storages
        self._opaque: dict[str, Global] = {}

    def find_global(self, module: str, name: str) -> Any:
        known = _GLOBALS.get((module, name))
        if known is not None:
            return known
        if module.partition(".")[0] in _OPAQUE_PACKAGES or (module, name) in _OPAQUE_NAMES:
            full_name = f"{module}.{name}"
            if full_name not in self._opaque:
                self._opaque[full_name] = _opaque(full_name)
            return self._opaque[full_name]
        raise UnsafePickleError(
            f"the pickle asks for {printable(module)}.{printable(name)}, which is refused; {_ACCEPTED}"
        )

    def find_storage(self, pid: Any) -> Storage:
        match pid:
            case ("storage", Global(value=torch.dtype() as dtype), str(key), _, int(numel)):
                pass
            case ("storage", Global(value=torch.dtype() as dtype), str(key), _, int(numel), None):
                pass
            case _:
                raise UnsafePickleError(
                    f"the pickle refers to an outside object of an unknown kind; {_ACCEPTED}"
                )
        storage = Storage(dtype, check_key(key), numel)
        if self._storages.setdefault(key, storage) != storage:
            raise UnsafePickleError(f"the pickle describes storage {printable(key)} in two ways")
        return storage


def parse(data: Buffer, start: int, end: int, storages: dict[str, Storage] | None = None) -> tuple[Any, int]:
    """Read the pickle at `data[start:end]`; returns its object and the position behind it.

    Built-in containers and numbers with `StoredTensor` and `Opaque` leaves; the storages that its tensors
    name are added to `storages`.
    Raises `UnsafePickleError` for a name outside the allow-list or work beyond the limits, and `ValueError`
    for a damaged pickle.
    """
    names = _Names({} if storages is None else storages)
    machine = Machine(data, start, end, names.find_global, names.find_storage)
    try:
        return machine.run(), machine.position
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged stream can fail inside any instruction
        raise ValueError(f"damaged pickle: {type(error).__name__}: {printable(error)}") from error


def load(file: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """As `parse`, of a seekable `file`, which is left just behind the pickle."""
    start = file.tell()
    data = file.read()
    value, end = parse(data, 0, len(data), storages)
    file.seek(start + end)
    return value


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
