"""Columns of parquet and arrow files, and of data sets saved by the package datasets; pyarrow reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loopmdm.data.dataset_folders import index_files, saved_files
from loopmdm.data.raw import Errors, bad_bytes, is_plain, no_field, open_raw
from loopmdm.printable import printable

_FILE_MAGIC = b"ARROW1"  # an arrow file; without it a stream, which is what datasets writes


def table_texts(path: Path, kind: str, text_field: str, errors: Errors) -> Iterator[str]:
    """The rows of the column `text_field` of a parquet or arrow file.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: a file that is not of this kind, no such column, a row that is no string; with the row.
    """
    for row, value in enumerate(_values(path, kind, text_field, _text_column)):
        where = f"{path}, row {row}"
        if not isinstance(value, bytes):
            raise ValueError(f"{where}: field {text_field!r} is a {type(value).__name__}; accepted: a string")
        try:
            yield value.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(bad_bytes(where, error)) from None


def saved_texts(folder: Path, text_field: str, errors: Errors) -> Iterator[str]:
    """The rows of a data set that `Dataset.save_to_disk` wrote, in its order."""
    texts = (
        text
        for name in saved_files(folder)
        for text in table_texts(folder / name, "arrow", text_field, errors)
    )
    indices = index_files(folder)
    if not indices:
        yield from texts
        return
    rows = list(texts)
    for name in indices:
        for index in _values(folder / name, "arrow", "indices", _checked):
            if not isinstance(index, int) or not 0 <= index < len(rows):
                raise ValueError(f"{folder / name}: index {index!r}, but the data set has {len(rows)} rows")
            yield rows[index]


def _values(path: Path, kind: str, name: str, prepare: Callable[[Any], Any]) -> Iterator[Any]:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ImportError(
            f"reading {path} needs the package pyarrow: pip install 'loopmdm-kernels[train]'"
        ) from None
    row = 0
    batches = _parquet(path, name) if kind == "parquet" else _arrow(path)
    while True:
        try:
            batch = next(batches, None)
            values = [] if batch is None or not batch.num_rows else _column(batch, name, prepare)
        except _NoColumn as error:
            raise ValueError(f"{path}, row {row}: {error}") from None
        except Exception as error:  # what a damaged file raises differs with the place
            raise ValueError(f"{path} cannot be read as {kind}, row {row}: {printable(error)}") from error
        if batch is None:
            return
        row += len(values)
        yield from values


class _NoColumn(Exception):
    pass


def _column(batch: Any, name: str, prepare: Callable[[Any], Any]) -> list[Any]:
    if name not in batch.schema.names:
        raise _NoColumn(no_field(name, batch.schema.names, "field"))
    column = batch.column(batch.schema.get_field_index(name))
    values: list[Any] = prepare(column).to_pylist()
    return values


def _text_column(column: Any) -> Any:
    """A column of strings as bytes, which decode as all others here; any other column as it is.

    Offsets are checked, since pyarrow follows those of a damaged file out of its memory.
    """
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    for text, data in (
        ("string", "binary"),
        ("large_string", "large_binary"),
        ("string_view", "binary_view"),
    ):
        if hasattr(pyarrow, text) and column.type == getattr(pyarrow, text)():
            column = column.view(getattr(pyarrow, data)())
    return _checked(column)


def _checked(column: Any) -> Any:
    column.validate(full=True)
    return column


def _parquet(path: Path, name: str) -> Iterator[Any]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(_open(path))
    # A dot in a name would be taken for a path into a nested column.
    alone = name in file.schema_arrow.names and "." not in name
    yield from file.iter_batches(columns=[name] if alone else None)


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow

    source = _open(path)
    start = source.read(len(_FILE_MAGIC))
    source.seek(0)
    if start == _FILE_MAGIC:
        reader = pyarrow.ipc.open_file(source)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(source)


def _open(path: Path) -> Any:
    import pyarrow

    with open_raw(path) as file:
        return pyarrow.memory_map(str(path)) if is_plain(file) else pyarrow.BufferReader(file.read())
