"""Ways to damage a file: any bytes, text and JSON, the structure of safetensors and zip files."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from typing import Any

EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"NaN", b"1e999", b"-1", b"99999999999999999999", b"null", b"true", b'"', b"\\", b"{", b"[" * 2000,
    b"\x00", b"\xff", b"\x1b]0;title\x07", b"\x1b[2J", "\u202e\ufeff".encode(),
    b"\r", b"\n\n", b",", b";", b"#",
    b"\t", b"../x",
)  # fmt: skip
VALUES = (
    None, True, -1, 0, 1.5, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "\x1b[2J",
    "../../etc/passwd", "/dev/zero", [], {}, [[[]]], {"a": 1}, [0] * 50, "F32", "BOOL", [2**40, 2**40],
    [-1, 5],
)  # fmt: skip
OPCODES = (
    b".()0123FIJKLMNPQRSTUVX]abcdeghijloprstuq}\x80\x81\x85\x86\x87\x88\x89\x8a\x8c"
    b"\x8e\x8f\x90\x93\x94\x95\x98"
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """The data damaged once or several times, by a way that suits its kind or any other."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        ways = [_bits, _bits, _cut, _insert, _remove, _length, _repeat, _words]
        if data[:4] == b"PK\x03\x04":
            ways += [_member] * 8
        elif _header_of(data) is not None:
            ways += [_tensors_header] * 8
        elif data[:1] in (b"{", b"["):
            ways += [_json] * 8
        elif b"\n" in data[:200]:
            ways += [_lines] * 4
        data = rng.choice(ways)(data, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """Most damage that matters is near the ends, where lengths and indices are."""
    size = len(data)
    if not size:
        return 0
    way = rng.random()
    near = min(size, 200)
    return (
        rng.randrange(near)
        if way < 0.3
        else size - 1 - rng.randrange(near)
        if way < 0.5
        else rng.randrange(size)
    )


def _bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)] if rng.random() < 0.8 else data[_place(data, rng) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 100))) + data[at:]


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 4, 8, 100)) :]


def _length(data: bytes, rng: random.Random) -> bytes:
    at, width = _place(data, rng), rng.choice((2, 4, 8))
    value = rng.choice((*EXTREMES, len(data), len(data) + 1)) % 2 ** (8 * width)
    return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    """A piece of the data in another place of it."""
    at, piece = _place(data, rng), _place(data, rng)
    size = rng.choice((8, 64, 1000))
    return data[:at] + data[piece : piece + size] + data[at + rng.choice((0, size)) :]


def _words(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice(WORDS) + data[at + rng.choice((0, 1, 5)) :]


def _lines(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return data.decode("utf-8", "replace").encode(
            rng.choice(("utf-16", "utf-16-be", "utf-8-sig", "utf-32"))
        )
    lines = data.split(b"\n")
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[first] = rng.choice(
        (lines[second], _words(lines[first], rng), b"", lines[first] * 2, b"# " + lines[first])
    )
    return rng.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines)


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _words(data, rng)
    return json.dumps(_changed(value, rng)).encode()


def _changed(value: Any, rng: random.Random) -> Any:
    """A value with one node renamed, dropped, doubled or replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        way = rng.random()
        if way < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if way < 0.2:
            renamed = rng.choice((key + "x", "", "\x1b[31m" + key, key.upper()))
            return {renamed if name == key else name: item for name, item in value.items()}
        if way < 0.3:
            return {**value, rng.choice(("x", "\x1b[2J", key + "0")): value[key]}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(value[at], rng), *value[at + rng.choice((0, 1, 1)) :]]
    return rng.choice(VALUES)


def _header_of(data: bytes) -> dict[str, Any] | None:
    """The header of a safetensors file."""
    if len(data) < 10 or data[8:9] != b"{":
        return None
    (size,) = struct.unpack("<Q", data[:8])
    try:
        header = json.loads(data[8 : 8 + min(size, len(data))])
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _tensors_header(data: bytes, rng: random.Random) -> bytes:
    """Another header, whole, before the same tensors; without the digest if there is one, or with it."""
    header = _header_of(data)
    if not header:
        return _bits(data, rng)
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5 and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"].pop("loopmdm_digest", None)
    changed = _changed(header, rng)
    text = json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _member(data: bytes, rng: random.Random) -> bytes:
    """Another archive with right checksums: a member damaged, dropped, doubled, renamed or compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return _bits(data, rng)
    if not members:
        return data
    pickles = [at for at, (name, _) in enumerate(members) if name.endswith(".pkl")]
    at = rng.choice(pickles) if pickles and rng.random() < 0.7 else rng.randrange(len(members))
    name, content = members[at]
    way = rng.random()
    if way < 0.7:
        members[at] = (name, _opcodes(content, rng) if rng.random() < 0.6 else damage(content, rng))
    elif way < 0.8:
        members.pop(at)
    elif way < 0.9:
        members[at] = (rng.choice(("../" + name, name + "x", "/etc/x", "\x1b[2J", name.upper())), content)
    else:
        members.append((name + rng.choice(("", "0")), content))
    method = zipfile.ZIP_STORED if rng.random() < 0.9 else zipfile.ZIP_DEFLATED
    buffer = io.BytesIO()
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that repeat
        for member, body in members:
            archive.writestr(member, body)
    return buffer.getvalue()


def _opcodes(data: bytes, rng: random.Random) -> bytes:
    """A pickle with other instructions, names to call, or numbers."""
    calls = (
        b"cos\nsystem\n", b"c__builtin__\neval\n", b"cbuiltins\ngetattr\n", b"cposix\nsystem\n",
        b"cbuiltins\nstr\n",
        b"cbuiltins\nlist\n", b"cbuiltins\nbytes\n", b"ccollections\nOrderedDict\n", b"ctorch\nload\n",
    )  # fmt: skip
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(len(changed)) if changed else 0
        way = rng.random()
        if way < 0.4 and changed:
            changed[at] = rng.choice(OPCODES)
        elif way < 0.6:
            changed[at:at] = bytes([rng.choice(OPCODES)])
        elif way < 0.75:
            changed[at:at] = rng.choice(calls)
        elif way < 0.85:
            changed[at:at] = rng.choice((b"(" * 3000, b"]" * 500, b"2" * 500, b"\x85" * 1000, b"2\x86" * 60))
        else:
            changed[at : at + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80"))
    return bytes(changed)
