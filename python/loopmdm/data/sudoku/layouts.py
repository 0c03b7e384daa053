"""Where the boards of a puzzle file stand: one a line, in columns of a table, or drawn over several lines."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

BLANKS = ".0_*-xX"
_PUZZLE_COLUMNS = (
    "puzzle", "puzzles", "quiz", "quizzes", "question", "questions", "clues", "sudoku", "board", "grid",
)  # fmt: skip
_SOLUTION_COLUMNS = ("solution", "solutions", "answer", "answers", "solved")
_BOARD_LENGTHS = (81, 36, 16)
_GRID_SIZES = (9, 6, 4)
_LEAST = min(_BOARD_LENGTHS)
_DELIMITERS = "\t,;"
_ALPHABET = frozenset("123456789" + BLANKS)
_STATE = "[state]"  # heading of .sdk: what follows is the same board, partly solved
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_BARS = re.compile(r"[\s|:\u2500-\u257f]")  # what separates cells; the range is box drawing
_RULE = re.compile(r"[-+=*|:\s\u2500-\u257f]*")
_BESIDE = re.compile(r"(?<=\|) {3}(?=\|)")  # a puzzle and its answer, as `loopmdm solve` prints them


class Written(NamedTuple):
    """A board as its file has it: the line it begins on, and a character a cell if nothing is wrong."""

    line: int
    puzzle: str
    solution: str | None


class Line(NamedTuple):
    number: int
    text: str


def find_boards(lines: Iterable[str], path: str) -> list[Written]:
    """The boards of the lines of a file, with or without solutions all of them.

    Raises:
        ValueError: no board is there, or a line does not fit the layout; it has `path` and the line.
    """
    content = list(_content(lines))
    boards = list(_drawn(content, path) if _is_drawn(content) else _in_lines(content, path))
    if not boards:
        raise ValueError(f"{path}: no puzzles in this file")
    return boards


def looks_like_board(text: str) -> bool:
    """Whether a word of the command line is meant to be a board itself, not the name of a file."""
    cells = _compact(text)
    return "\n" in text or len(text) in _BOARD_LENGTHS or (len(cells) > 9 and set(cells) <= _ALPHABET)


def _content(lines: Iterable[str]) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        text = _COLORS.sub("", line).strip("\ufeff \t\r\n")
        if text and text[0] not in "#;":
            yield Line(number, text)


def _is_words(text: str) -> bool:
    """Whether this is a heading, not cells, be they wrong."""
    return any(c.isalpha() and c not in BLANKS for c in text) and not _is_board(_compact(text))


def _is_board(field: str) -> bool:
    """Whether a field is meant to be a board: long enough, and most of its characters are cells."""
    if len(field) < _LEAST or _ALPHABET.issuperset(field):
        return len(field) >= _LEAST
    cells = sum(c in _ALPHABET for c in field) / len(field)
    return cells > (0.5 if len(field) in _BOARD_LENGTHS else 0.75)


def _compact(field: str) -> str:
    return _BARS.sub("", field)


# Boards drawn over several lines: .sdk, .ss, what `format_board` prints.


def _is_drawn(content: Sequence[Line]) -> bool:
    rows = (text for _, text in content if not _is_words(text))
    first = next(rows, "")
    if _RULE.fullmatch(first):  # of a blank board the rows may look like rules
        first = next((text for text in rows if not _RULE.fullmatch(text)), first)
    return len(_row(first)) in _GRID_SIZES


def _row(text: str) -> str:
    """The cells of one line of a drawing."""
    left = _BESIDE.split(text)[0]
    for delimiter in _DELIMITERS:
        fields = [field.strip() for field in left.split(delimiter)]
        if len(fields) > 1 and max(map(len, fields)) == 1:
            return "".join(field or "." for field in fields)
    return _compact(left)


def _drawn(content: Sequence[Line], path: str) -> Iterator[Written]:
    rows: list[Line] = []
    first = size = 0
    for number, cells in _rows(content):
        if cells.lower() == _STATE and not rows:
            return
        if not rows:
            first, size = number, len(cells)
        if _is_heading(cells, size):
            if rows:
                raise ValueError(f"{path}, line {number}: a heading inside {_so_far(rows)}")
            continue
        if len(cells) != size or size not in _GRID_SIZES:
            expected = f"the board begins in line {first} with {size}" if rows else "a row has 9, 6 or 4"
            raise ValueError(f"{path}, line {number}: {len(cells)} cells in this row; {expected}")
        for column, cell in enumerate(cells, 1):
            if cell not in BLANKS and not "1" <= cell <= str(size):
                raise ValueError(
                    f"{path}, line {number}: {cell!r} at cell {column} of this row; {accepted(size)}"
                )
        rows.append(Line(number, cells))
        if len(rows) == size:
            yield Written(first, "".join(row.text for row in rows), None)
            rows.clear()
    if rows:
        raise ValueError(f"{path}, line {rows[-1].number}: the file ends inside {_so_far(rows)}")


def _rows(content: Sequence[Line]) -> Iterator[Line]:
    """The cells of every row, and headings; rules between boxes are left out.

    A line of dashes or stars as long as a row is one of blanks where the boards are not complete without it.
    """
    drawn = [(number, _row(text), _RULE.fullmatch(text) is not None) for number, text in content]
    lengths = [len(cells) for _, cells, rule in drawn if not rule and not _is_heading(cells, len(cells))]
    # Without any other row the board is blank, and its rows are as long as the first.
    size = lengths[0] if lengths else next((len(cells) for _, cells, rule in drawn if rule), 0)
    complete = bool(lengths) and lengths.count(size) % size == 0
    for number, cells, rule in drawn:
        if not rule or (not complete and len(cells) == size and set(cells) <= _ALPHABET):
            yield Line(number, cells)


def _is_heading(cells: str, size: int) -> bool:
    """Whether a line that is no rule is words: a row of this size may have a wrong character."""
    like_a_row = len(cells) == size in _GRID_SIZES and 2 * sum(c in _ALPHABET for c in cells) >= size
    return not like_a_row and any(c.isalpha() and c not in BLANKS for c in cells)


def _so_far(rows: Sequence[Line]) -> str:
    return (
        f"the board that begins in line {rows[0].number}: it has {len(rows)} of its {len(rows[0].text)} rows"
    )


def accepted(size: int) -> str:
    """What a message says about the characters of a board."""
    return f"accepted are 1..{size} and {' '.join(BLANKS[:-1])} for a blank"


# A board a line, alone or in a column of a table.


def _in_lines(content: Sequence[Line], path: str) -> Iterator[Written]:
    if not content:
        return
    rows = [(number, _split(text)) for number, text in content]
    header = None
    if _is_header(_all_joined(rows[0])):
        header = _all_joined(rows.pop(0))
    if not rows:
        return
    puzzle, solution = _columns(header, _all_joined(rows[0]), rows[0][0], path)
    needed = 1 + max(puzzle, -1 if solution is None else solution)
    for number, fields in rows:
        if len(fields) < needed:
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, expected at least {needed}")
        answer = None if solution is None else _joined(fields[solution])
        yield Written(number, _joined(fields[puzzle]), answer)


def _split(text: str) -> list[str]:
    """The fields of a line."""
    if _ALPHABET.issuperset(text):
        return [text]
    before_comment = _compact(text.split("#")[0])
    if len(before_comment) in _BOARD_LENGTHS and _ALPHABET.issuperset(before_comment):
        return [before_comment]
    for delimiter in _DELIMITERS:
        if delimiter in text:
            if '"' not in text:
                fields = text.split(delimiter)
            else:
                fields = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))
            if len(fields) in _BOARD_LENGTHS and max(map(len, fields)) <= 1:
                return ["".join(field.strip() or "." for field in fields)]
            return fields
    return [text] if _is_board(_compact(text)) and not _has_boards(text) else text.split()


def _joined(field: str) -> str:
    """A board without what separates its cells; any other field without spaces around it."""
    if _ALPHABET.issuperset(field):
        return field
    compact = _compact(field)
    return compact if _is_board(compact) else field.strip()


def _all_joined(row: tuple[int, Sequence[str]]) -> list[str]:
    return [_joined(field) for field in row[1]]


def _has_boards(text: str) -> bool:
    """Whether words of a line are boards, so that the spaces are between columns, not between cells."""
    return any(map(_is_board, text.split())) and " " in text


def _is_header(fields: Sequence[str]) -> bool:
    names = {field.lower() for field in fields}
    known = names & {*_PUZZLE_COLUMNS, *_SOLUTION_COLUMNS}
    return bool(known) or (any(map(_is_words, fields)) and not any(map(_is_board, fields)))


def _columns(
    header: Sequence[str] | None, fields: Sequence[str], line: int, path: str
) -> tuple[int, int | None]:
    """Where the puzzle and the solution stand: by name where the header has one, else by what is in there.

    fields: of the first row of boards, which is that `line`.
    """
    boards = [i for i, field in enumerate(fields) if _is_board(field)]
    # An index of many digits looks like a small board.
    longest = max((len(fields[i]) for i in boards), default=0)
    boards = [i for i in boards if 2 * len(fields[i]) > longest]
    if header is None and len(fields) == 1:
        return 0, None
    names = [] if header is None else [name.lower() for name in header]
    if not boards:
        named = next((i for i, name in enumerate(names) if name in _PUZZLE_COLUMNS), None)
        if named is not None:
            return named, None
        columns = ", ".join(map(repr, header or fields))
        what = f"no column of the header ({columns})" if header else f"none of the columns ({columns})"
        raise ValueError(
            f"{path}, line {line}: {what} holds a board here; expected a puzzle (81, 36 or 16 characters)"
            " and, if there is one, its solution"
        )
    puzzle = next((i for i in boards if i < len(names) and names[i] in _PUZZLE_COLUMNS), None)
    solution = next((i for i in boards if i < len(names) and names[i] in _SOLUTION_COLUMNS), None)
    rest = [i for i in boards if i not in (puzzle, solution)]
    if puzzle is None and rest:
        puzzle = next((i for i in rest if _has_blanks(fields[i])), rest[0])
        rest.remove(puzzle)
    if puzzle is None:
        raise ValueError(
            f"{path}, line {line}: only a solution is here; expected a column puzzle before or after it"
        )
    if solution is None and rest and (header is None or not _has_blanks(fields[rest[0]])):
        solution = rest[0]
    return puzzle, solution


def _has_blanks(board: str) -> bool:
    return any(cell in BLANKS for cell in board)
