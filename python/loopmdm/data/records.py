"""Documents of one file: lines of JSON, rows of a table, or the text of the file itself."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from loopmdm.data.files import SAVED, DataFile, is_archive
from loopmdm.data.raw import (
    Errors,
    PointerError,
    bad_bytes,
    decode,
    encoding_of,
    known,
    no_field,
    open_raw,
)
from loopmdm.printable import printable

_BINARY_PROBE = 8192  # a NUL byte this early marks a binary file, as in git
_DELIMITERS = {"CSV": ",;\t|", "TSV": "\t,;|"}  # the usual one first
_SPACE = re.compile(r"[ \t\r\n]*")


class NotText(ValueError):
    """A file that holds no documents: an error where the caller named it, left out of a folder otherwise."""

    def __init__(self, message: str, why: str, detail: str = "") -> None:
        super().__init__(message)
        self.why, self.detail = why, detail


def documents_of(file: DataFile, text_field: str, errors: Errors) -> Iterator[str]:
    """The documents of a file, empty ones too.

    Raises:
        NotText: a binary file, an archive, JSON or a table without a field of this name; before a document.
        ValueError: anything else that is not what the kind of the file says, with the line or the row.
        ImportError: a package that reads this kind of file is missing.
    """
    path = file.path
    if file.kind in ("parquet", "arrow", SAVED):
        from loopmdm.data.tables import saved_texts, table_texts

        if file.kind == SAVED:
            return saved_texts(path, text_field, errors)
        return table_texts(path, file.kind, text_field, errors)
    if is_archive(path):
        raise NotText(
            f"{path} is an archive or compressed in a way that is not read: unpack it first",
            "archive(s) or compressed file(s) of a kind that is not read",
        )
    if file.kind == "JSON lines":
        return _json_lines(path, text_field, errors)
    if file.kind == "JSON":
        return _json(path, text_field, errors)
    if file.kind in _DELIMITERS:
        return _table(path, _DELIMITERS[file.kind], text_field, errors)
    return iter([_text(path, errors)])


def text_of(record: Any, text_field: str, where: str, errors: Errors) -> str:
    """The text of one record.

    Raises:
        ValueError: no object, no such field, no string, or one with half a surrogate pair and strict errors.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}; accepted: an object with a text field")
    if text_field not in record:
        raise ValueError(f"{where}: {no_field(text_field, record, 'field')}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r} is a {type(text).__name__}; accepted: a string")
    return whole(text, f"{where}: field {text_field!r}", errors)


def whole(text: str, what: str, errors: Errors) -> str:
    """`text` without half surrogate pairs, which JSON can spell and no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            code = ord(text[error.start])
            raise ValueError(
                f"{what} holds U+{code:04X}, half of a surrogate pair, which is no character;"
                " read it with errors='replace'"
            ) from None
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


def _text(path: Path, errors: Errors) -> str:
    try:
        with open_raw(path) as file:
            start = file.read(_BINARY_PROBE)
            nul = start.find(b"\0")
            if nul >= 0 and encoding_of(start) == "utf-8":
                raise NotText(f"{path} is not a text file: NUL byte at offset {nul}", "binary file(s)")
            return decode(start + file.read(), path, errors)
    except PointerError as error:
        raise NotText(str(error), "pointer(s) of Git LFS, not fetched") from None


def _lines(path: Path, errors: Errors) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, without its byte order mark."""
    offset = 0
    with open_raw(path) as raw:
        for number, line in enumerate(_utf8(raw, path, errors), start=1):
            try:
                text = line.decode("utf-8", errors)
            except UnicodeDecodeError as error:
                raise ValueError(bad_bytes(f"{path}, line {number}", error, offset=offset)) from None
            offset += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _utf8(raw: BinaryIO, path: Path, errors: Errors) -> BinaryIO:
    start = raw.peek(4)  # type: ignore[attr-defined]
    if encoding_of(start) == "utf-8":
        return raw
    return io.BytesIO(decode(raw.read(), path, errors).encode())


def _json_lines(path: Path, text_field: str, errors: Errors) -> Iterator[str]:
    for number, line in _lines(path, errors):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({_reason(error)})") from None
            yield text_of(record, text_field, where, errors)


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json(path: Path, text_field: str, errors: Errors) -> Iterator[str]:
    """Records of an array, or one after the other; of a single object its text, or its texts by row."""
    with open_raw(path) as raw:
        text = decode(raw.read(), path, errors)
    values = _json_values(text, path)
    line, first = next(values, (0, None))
    if not line:  # an empty file or array
        return
    where = f"{path}, line {line}"
    if not isinstance(first, dict):
        kind = type(first).__name__
        raise NotText(
            f"{where}: a {kind}; accepted: objects with a text field", "JSON file(s) without records"
        )
    if text_field not in first:
        message = f"{where}: {no_field(text_field, first, 'field')}"
        raise NotText(message, f"JSON file(s) without field {text_field!r}", known(first, "field"))
    column, second = first[text_field], next(values, None)
    if second is None and isinstance(column, (list, dict)):  # {"text": [...]}, or {"0": ...} as pandas writes
        for row, value in enumerate(column.values() if isinstance(column, dict) else column):
            yield text_of({text_field: value}, text_field, f"{where}, row {row}", errors)
        return
    yield text_of(first, text_field, where, errors)
    for line, record in itertools.chain([] if second is None else [second], values):
        yield text_of(record, text_field, f"{path}, line {line}", errors)


def _json_values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of the items of an array, or of values one after the other."""
    decoder = json.JSONDecoder()
    position = _after_space(text, 0)
    array = text.startswith("[", position)
    position = _after_space(text, position + array)
    line, counted = 1, 0
    while position < len(text) and not (array and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _not_json(path, text, error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _not_json(path, text, position, _reason(error)) from None
        yield line, value
        position = _after_space(text, position)
        if array and text.startswith(",", position):
            position = _after_space(text, position + 1)
        elif array and position < len(text) and text[position] != "]":
            raise _not_json(path, text, position, "expected ',' or ']'")
    if array:
        if position == len(text):
            raise _not_json(path, text, position, "the array has no end")
        position = _after_space(text, position + 1)
        if position < len(text):
            raise _not_json(path, text, position, "text after the array")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def _not_json(path: Path, text: str, position: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {text.count(chr(10), 0, position) + 1}: not JSON ({what})")


def _table(path: Path, delimiters: str, text_field: str, errors: Errors) -> Iterator[str]:
    """The column `text_field` of a table with a header."""
    lines = _lines(path, errors)
    header = next(((number, line) for number, line in lines if line.strip()), None)
    if header is None:
        return
    number, first = header
    delimiter, names = _header(first, delimiters, text_field, f"{path}, line {number}")
    if text_field not in names:
        message = f"{path}, line {number}: {no_field(text_field, names, 'column')}"
        raise NotText(message, f"table(s) without column {text_field!r}", known(names, "column"))
    column = names.index(text_field)
    rows = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    start = number + 1
    for row in _rows(rows, path, number):
        where = f"{path}, line {start}"
        start = number + rows.line_num + 1
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(f"{where}: {len(row)} fields, the header has {len(names)}")
        yield row[column]


def _header(line: str, delimiters: str, text_field: str, where: str) -> tuple[str, list[str]]:
    """The delimiter that gives a header the column, else the usual one; and the names it gives."""
    try:
        split = {d: [name.strip() for name in next(csv.reader([line], delimiter=d))] for d in delimiters}
    except csv.Error as error:
        raise ValueError(f"{where}: not the header of a table ({printable(error)})") from None
    delimiter = next((d for d in delimiters if text_field in split[d]), delimiters[0])
    return delimiter, split[delimiter]


def _rows(rows: Any, path: Path, header: int) -> Iterator[list[str]]:
    while True:
        limit = csv.field_size_limit(sys.maxsize)  # of the module: documents may be long
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {header + rows.line_num}: not a table ({printable(error)})"
            ) from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        yield row
