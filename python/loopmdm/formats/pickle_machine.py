"""An interpreter of pickle instructions that cannot do more work than the pickle is long.

Python's own reader calls what a pickle names, and even with harmless names a few hundred bytes can ask it to
hash or copy structures that are shared exponentially often, or nest them until the process ends. Here every
instruction is carried out by this class: containers are plain, keys are scalars (so hashing and comparing are
cheap), copies are paid for from a budget of the pickle's own length, and nesting, objects and integers have
limits far beyond those of real checkpoints.
"""

from __future__ import annotations

import codecs
import mmap
import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from loopmdm.printable import printable

Buffer: TypeAlias = bytes | mmap.mmap

MAX_INSTRUCTIONS = 10_000_000
MAX_CONTAINERS = 1_000_000
MAX_NESTING = 1000
MAX_INT_BYTES = 128
MAX_DIGITS = 320
MAX_KEY_LENGTH = 4096
# Integers within have hashes of their own; larger ones could be chosen to collide.
_MAX_INT_KEY = 2**60
_HIGHEST_PROTOCOL = 5


class UnsafePickleError(ValueError):
    """The pickle names something outside the allow-list, or asks for more work than it may."""


class Global:
    """What a name in the pickle stands for; `call` is what calling it does, None if it cannot be called."""

    __slots__ = ("call", "name", "value")

    def __init__(self, name: str, call: Callable[..., Any] | None = None, value: Any = None) -> None:
        self.name, self.call, self.value = name, call, value


class Opaque:
    """Stands for an object of an allow-listed library; holds the arguments, state and items of the file."""

    __slots__ = ("args", "elements", "entries", "global_name", "state")

    def __init__(self, global_name: str, args: tuple[Any, ...]) -> None:
        self.global_name, self.args = global_name, args
        self.state: Any = None
        self.entries: dict[Any, Any] = {}
        self.elements: list[Any] = []


def check_key(key: Any) -> Any:
    """`key`, if it is a scalar that is cheap to hash and compare."""
    kind = type(key)
    if kind in (str, bytes):
        if len(key) <= MAX_KEY_LENGTH:
            return key
        raise UnsafePickleError(f"the pickle has a key of {len(key)} characters (limit {MAX_KEY_LENGTH})")
    if kind is int:
        if -_MAX_INT_KEY < key < _MAX_INT_KEY:
            return key
        raise UnsafePickleError("the pickle has an integer beyond 60 bits as a key")
    if key is None or kind in (bool, float, torch.dtype, Global, Opaque):
        return key
    raise UnsafePickleError(
        f"the pickle has a {kind.__name__} as a key or a member of a set; accepted are scalars"
    )


class Machine:
    """Reads one pickle out of `data[start:end]`; `position` is behind it afterwards.

    Args:
        find_global: (module, name) -> Global or a plain value; raises for what is refused.
        find_storage: the object of a persistent id.
    """

    def __init__(
        self,
        data: Buffer,
        start: int,
        end: int,
        find_global: Callable[[str, str], Any],
        find_storage: Callable[[Any], Any],
    ) -> None:
        self._data, self.position, self._end = data, start, end
        self._find_global, self._find_storage = find_global, find_storage
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._budget = end - start
        # Nesting by identity; the containers are kept so that no identity is used twice.
        self._nesting: dict[int, int] = {}
        self._containers: list[Any] = []

    def run(self) -> Any:
        data, end = self._data, self._end
        for count in range(MAX_INSTRUCTIONS):
            if self.position >= end:
                raise ValueError("it ends in the middle")
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise ValueError(f"unknown instruction {code:#04x}")
            self._count = count
            step(self)
        raise UnsafePickleError(f"the pickle has more than {MAX_INSTRUCTIONS} instructions")

    def pay(self, items: int) -> None:
        """Copying `items` elements costs as much; a pickle has as many to spend as it has bytes."""
        self._budget -= items
        if self._budget < 0:
            raise UnsafePickleError("the pickle copies the same objects again and again, which is refused")

    # Reading arguments

    def _take(self, size: int) -> bytes:
        begin, self.position = self.position, self.position + size
        if self.position > self._end:
            raise ValueError("it ends in the middle")
        return self._data[begin : self.position]

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _signed(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little", signed=True)

    def _sized(self, size: int) -> bytes:
        return self._take(self._unsigned(size))

    def _line(self) -> bytes:
        stop = self._data.find(b"\n", self.position, self._end)
        if stop < 0:
            raise ValueError("it ends in the middle")
        line = self._data[self.position : stop]
        self.position = stop + 1
        return line

    def _digits(self) -> str:
        line = self._line()
        if len(line) > MAX_DIGITS:
            raise UnsafePickleError(f"the pickle has a number of {len(line)} digits (limit {MAX_DIGITS})")
        return line.decode("ascii")

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    # Containers

    def container(self, value: Any, children: Iterable[Any] = ()) -> Any:
        """`value`, a new container of `children`, counted."""
        if len(self._containers) >= MAX_CONTAINERS:
            raise UnsafePickleError(f"the pickle makes more than {MAX_CONTAINERS} objects")
        self._containers.append(value)
        self._nest(value, children)
        return value

    def _nest(self, parent: Any, children: Iterable[Any]) -> None:
        nesting = self._nesting
        depth = 1 + max((nesting.get(id(child), 0) for child in children), default=0)
        if depth > MAX_NESTING:
            raise UnsafePickleError(f"the pickle nests objects more than {MAX_NESTING} deep")
        if depth > nesting.get(id(parent), 0):
            nesting[id(parent)] = depth

    def _push_container(self, value: Any, children: Iterable[Any] = ()) -> None:
        self._stack.append(self.container(value, children))

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise ValueError("it takes more from the stack than there is")
        items = tuple(self._stack[-size:])
        del self._stack[-size:]
        self._push_container(items, items)

    def _set_items(self, target: Any, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise ValueError("a key without a value")
        entries = target.entries if type(target) is Opaque else target
        if type(entries) is not dict:
            raise ValueError(f"items are set on a {type(target).__name__}")
        self._nest(target, pairs)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            entries[check_key(key)] = value

    def _append(self, target: Any, items: list[Any]) -> None:
        elements = target.elements if type(target) is Opaque else target
        if type(elements) is not list:
            raise ValueError(f"items are appended to a {type(target).__name__}")
        self._nest(target, items)
        elements.extend(items)

    # Instructions

    def _push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        self._stack.append(self._find_global(module, name))

    def _call(self, function: Any, args: Any, keywords: Any = None) -> None:
        if type(function) is not Global or function.call is None:
            shown = getattr(function, "name", None) or type(function).__name__
            raise UnsafePickleError(f"the pickle calls {printable(shown)}, which is refused")
        if type(args) is not tuple or (keywords is not None and type(keywords) is not dict):
            raise ValueError("a call whose arguments are no tuple")
        result = function.call(self, args)
        if type(result) in (list, dict, set, frozenset, tuple, Opaque):
            self.container(result, args)
        self._stack.append(result)

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is Opaque:
            self._nest(target, (state,))
            target.state = state
        elif type(target) is Global:
            raise UnsafePickleError(f"the pickle tries to alter {printable(target.name)}, which is refused")
        elif type(target) is not dict:  # attributes of an OrderedDict and the like carry no weights
            raise UnsafePickleError(f"the pickle sets attributes of a {type(target).__name__}")

    def _put(self, index: int) -> None:
        if not 0 <= index <= self._count:
            raise UnsafePickleError(f"the pickle uses memo index {index} at instruction {self._count}")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"memo {index} was never written")
        self._stack.append(self._memo[index])

    def _int(self) -> None:
        text = self._digits()
        self._stack.append({"00": False, "01": True}[text] if text in ("00", "01") else int(text))

    def _long(self, size: int) -> None:
        data = self._sized(size)
        if len(data) > MAX_INT_BYTES:
            raise UnsafePickleError(
                f"the pickle has an integer of {len(data)} bytes, at most {MAX_INT_BYTES} are"
            )
        self._stack.append(int.from_bytes(data, "little", signed=True))

    def _string(self) -> None:
        line = self._line().rstrip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise ValueError("a text without quotes")
        self._stack.append(codecs.escape_decode(line[1:-1])[0].decode("ascii"))

    def _inst(self) -> None:
        module, name = self._line().decode("utf-8"), self._line().decode("utf-8")
        args = tuple(self._pop_mark())
        self._push_global(module, name)
        self._call(self._stack.pop(), self.container(args, args))

    def _obj(self) -> None:
        function, *args = self._pop_mark()
        self._call(function, self.container(tuple(args), args))

    def _new_object(self) -> None:
        args = self._stack.pop()
        self._call(self._stack.pop(), args)

    def _new_object_with_keywords(self) -> None:
        keywords, args = self._stack.pop(), self._stack.pop()
        self._call(self._stack.pop(), args, keywords)

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _mark(self) -> None:
        if len(self._marks) >= MAX_CONTAINERS:
            raise UnsafePickleError(f"the pickle opens more than {MAX_CONTAINERS} groups")
        self._marks.append(self._stack)
        self._stack = []

    def _dict(self) -> None:
        pairs, made = self._pop_mark(), self.container({})
        self._set_items(made, pairs)
        self._stack.append(made)

    def _list(self) -> None:
        items = self._pop_mark()
        self._push_container(items, items)

    def _tuple_of_mark(self) -> None:
        items = tuple(self._pop_mark())
        self._push_container(items, items)

    def _frozenset(self) -> None:
        self._push_container(frozenset(map(check_key, self._pop_mark())))

    def _append_one(self) -> None:
        item = self._stack.pop()
        self._append(self._stack[-1], [item])

    def _append_marked(self) -> None:
        items = self._pop_mark()
        self._append(self._stack[-1], items)

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items(self._stack[-1], [key, value])

    def _set_marked(self) -> None:
        pairs = self._pop_mark()
        self._set_items(self._stack[-1], pairs)

    def _add_marked(self) -> None:
        items = self._pop_mark()
        if type(self._stack[-1]) is not set:
            raise ValueError(f"members are added to a {type(self._stack[-1]).__name__}")
        self._stack[-1].update(map(check_key, items))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_global(module, name)

    def _frame(self) -> None:
        if self._unsigned(8) > self._end - self.position:
            raise ValueError("it ends in the middle of a frame")

    def _protocol(self) -> None:
        protocol = self._unsigned(1)
        if protocol > _HIGHEST_PROTOCOL:
            raise ValueError(f"pickle protocol {protocol} is unknown")

    def _extension(self, size: int) -> None:
        raise UnsafePickleError(f"the pickle uses extension code {self._unsigned(size)}, which is refused")

    def _buffer(self) -> None:
        raise UnsafePickleError("the pickle refers to data outside itself, which is refused")

    def _push(self, value: Any) -> None:
        self._stack.append(value)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_STOP = pickle.STOP[0]
_STEPS: dict[int, Callable[[Machine], None]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: lambda m: m._protocol(),
        pickle.FRAME: lambda m: m._frame(),
        pickle.MARK: lambda m: m._mark(),
        pickle.POP: lambda m: m._pop(),
        pickle.POP_MARK: lambda m: m._pop_mark() and None,
        pickle.DUP: lambda m: m._push(m._stack[-1]),
        # Scalars
        pickle.NONE: lambda m: m._push(None),
        pickle.NEWTRUE: lambda m: m._push(True),
        pickle.NEWFALSE: lambda m: m._push(False),
        pickle.INT: lambda m: m._int(),
        pickle.BININT: lambda m: m._push(m._signed(4)),
        pickle.BININT1: lambda m: m._push(m._unsigned(1)),
        pickle.BININT2: lambda m: m._push(m._unsigned(2)),
        pickle.LONG: lambda m: m._push(int(m._digits().removesuffix("L"))),
        pickle.LONG1: lambda m: m._long(1),
        pickle.LONG4: lambda m: m._long(4),
        pickle.FLOAT: lambda m: m._push(float(m._digits())),
        pickle.BINFLOAT: lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
        # Texts and bytes
        pickle.STRING: lambda m: m._string(),
        pickle.BINSTRING: lambda m: m._push(m._sized(4).decode("ascii")),
        pickle.SHORT_BINSTRING: lambda m: m._push(m._sized(1).decode("ascii")),
        pickle.UNICODE: lambda m: m._push(m._line().decode("raw-unicode-escape")),
        pickle.BINUNICODE: lambda m: m._push(_text(m._sized(4))),
        pickle.SHORT_BINUNICODE: lambda m: m._push(_text(m._sized(1))),
        pickle.BINUNICODE8: lambda m: m._push(_text(m._sized(8))),
        pickle.BINBYTES: lambda m: m._push(m._sized(4)),
        pickle.SHORT_BINBYTES: lambda m: m._push(m._sized(1)),
        pickle.BINBYTES8: lambda m: m._push(m._sized(8)),
        pickle.BYTEARRAY8: lambda m: m._push(m._sized(8)),
        # Containers
        pickle.EMPTY_LIST: lambda m: m._push_container([]),
        pickle.EMPTY_TUPLE: lambda m: m._push_container(()),
        pickle.EMPTY_DICT: lambda m: m._push_container({}),
        pickle.EMPTY_SET: lambda m: m._push_container(set()),
        pickle.LIST: lambda m: m._list(),
        pickle.TUPLE: lambda m: m._tuple_of_mark(),
        pickle.TUPLE1: lambda m: m._tuple(1),
        pickle.TUPLE2: lambda m: m._tuple(2),
        pickle.TUPLE3: lambda m: m._tuple(3),
        pickle.DICT: lambda m: m._dict(),
        pickle.FROZENSET: lambda m: m._frozenset(),
        pickle.APPEND: lambda m: m._append_one(),
        pickle.APPENDS: lambda m: m._append_marked(),
        pickle.SETITEM: lambda m: m._set_one(),
        pickle.SETITEMS: lambda m: m._set_marked(),
        pickle.ADDITEMS: lambda m: m._add_marked(),
        # Memo
        pickle.GET: lambda m: m._get(int(m._digits())),
        pickle.BINGET: lambda m: m._get(m._unsigned(1)),
        pickle.LONG_BINGET: lambda m: m._get(m._unsigned(4)),
        pickle.PUT: lambda m: m._put(int(m._digits())),
        pickle.BINPUT: lambda m: m._put(m._unsigned(1)),
        pickle.LONG_BINPUT: lambda m: m._put(m._unsigned(4)),
        pickle.MEMOIZE: lambda m: m._put(len(m._memo)),
        # Names, calls, states
        pickle.GLOBAL: lambda m: m._push_global(m._line().decode("utf-8"), m._line().decode("utf-8")),
        pickle.STACK_GLOBAL: lambda m: m._stack_global(),
        pickle.REDUCE: lambda m: m._new_object(),
        pickle.NEWOBJ: lambda m: m._new_object(),
        pickle.NEWOBJ_EX: lambda m: m._new_object_with_keywords(),
        pickle.INST: lambda m: m._inst(),
        pickle.OBJ: lambda m: m._obj(),
        pickle.BUILD: lambda m: m._build(),
        pickle.PERSID: lambda m: m._push(m._find_storage(m._line().decode("ascii"))),
        pickle.BINPERSID: lambda m: m._push(m._find_storage(m._stack.pop())),
        # Refused
        pickle.EXT1: lambda m: m._extension(1),
        pickle.EXT2: lambda m: m._extension(2),
        pickle.EXT4: lambda m: m._extension(4),
        pickle.NEXT_BUFFER: lambda m: m._buffer(),
        pickle.READONLY_BUFFER: lambda m: m._buffer(),
    }.items()
}
