"""The layouts puzzle files come in: each gives the same boards, and a line that fits none is named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from loopmdm.data.sudoku import (
    FOUR,
    NINE,
    SIX,
    SudokuSpec,
    encode_boards,
    format_board,
    generate,
    parse_puzzles,
    read_puzzles,
)

P = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
S = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
ROWS = [P[i : i + 9] for i in range(0, 81, 9)]
CELLS, FULL = (np.array([[int(c) for c in board.replace(".", "0")]], dtype=np.uint8)[0] for board in (P, S))
BOXES = [["|".join([row[:3], row[3:6], row[6:]]) for row in ROWS[band : band + 3]] for band in (0, 3, 6)]


def drawn(rule: str, ends: str, bar: str = "|") -> str:
    bands = ["\n".join(f"{bar}{row}{bar}" for row in band) for band in BOXES]
    return f"{ends}\n" + f"\n{rule}\n".join(bands) + f"\n{ends}\n"


def lines(text: str) -> io.StringIO:
    return io.StringIO(text, newline=None)


@pytest.mark.parametrize("blank", list(".0_*-xX"))
@pytest.mark.parametrize("separator", ["", "\n", " ", "|", " | "])
def test_every_blank_in_one_line_and_in_rows(blank: str, separator: str) -> None:
    text = separator.join(ROWS).replace(".", blank)
    assert encode_boards(NINE, parse_puzzles(lines(text), "f").clues) == [P]


DRAWN = {
    ".sdk": ("#Asomeone\n#D29-11-2026\n" + "\n".join(ROWS), [3]),
    "[Puzzle]": ("[Puzzle]\n" + "\n".join(ROWS), [2]),
    "[Puzzle] and [State]": ("\n".join(["[Puzzle]", *ROWS, "", "[State]", S[:9], *ROWS[1:]]), [2]),
    ".ss": (drawn("|---+---+---|", "*-----------*"), [2]),
    ".ss with dashes": (drawn("-----------", "-----------"), [2]),
    "bars for crossings": (drawn("|---|---|---|", "|---|---|---|"), [2]),
    "box drawing": (drawn("├───┼───┼───┤", "┌───┬───┬───┐", "│"), [2]),
    "spaces": ("\n".join(" ".join(row) for row in ROWS), [1]),
    "commas": ("\n".join(",".join(row).replace(".", "0") for row in ROWS), [1]),
    "commas and nothing for a blank": ("\n".join(",".join(row).replace(".", "") for row in ROWS), [1]),
    "tabs": ("\n".join("\t".join(row).replace(".", "0") for row in ROWS), [1]),
    "printed": (format_board(NINE, CELLS), [2]),
    "printed in colour": (format_board(NINE, CELLS, clues=CELLS, color=True), [2]),
    "two without a gap": ("\n".join(ROWS * 2), [1, 10]),
    "two and an empty line": ("\n".join([*ROWS, "", *ROWS]), [1, 11]),
    "headings": ("".join(f"Grid 0{i}\n" + "\n".join(ROWS) + "\n" for i in (1, 2, 3)), [2, 12, 22]),
}


@pytest.mark.parametrize("layout", DRAWN)
def test_boards_over_several_lines(layout: str) -> None:
    text, first_lines = DRAWN[layout]
    back = parse_puzzles(lines(text), "f")
    assert encode_boards(NINE, back.clues) == [P] * len(first_lines)
    assert back.lines.tolist() == first_lines and back.solutions is None


def test_what_solve_prints_is_read_back() -> None:
    both = zip(format_board(NINE, CELLS).splitlines(), format_board(NINE, FULL).splitlines(), strict=True)
    board = "\n".join(f"{left}   {right}" for left, right in both)
    text = (
        f"Answers at S = 8, confidence order:\n\nline 1: solved\n{board}\n\nline 2: wrong\n{board}\n\n"
        "2 puzzles of 9x9, model sudoku9\n\norder       loops S\n──────────  ───────\nconfidence        8\n"
    )
    back = parse_puzzles(lines(text), "f")
    assert encode_boards(NINE, back.clues) == [P, P] and back.lines.tolist() == [5, 20]


@pytest.mark.parametrize("blank", "-*")
def test_a_line_of_dashes_is_a_rule_or_a_row_of_blanks(blank: str) -> None:
    """Where all other rows make whole boards it is a rule; else it is the row that is missing."""
    empty = blank * 9
    rows = [row.replace(".", blank) for row in ROWS]
    for position in (0, 1, 4, 8):
        text = "\n".join([*rows[:position], empty, *rows[position + 1 :]])
        expected = "".join([*ROWS[:position], "." * 9, *ROWS[position + 1 :]])
        assert encode_boards(NINE, parse_puzzles(lines(text), "f").clues) == [expected]
    ruled = "\n".join([*rows[:3], empty, *rows[3:6], empty, *rows[6:]])
    assert encode_boards(NINE, parse_puzzles(lines(ruled), "f").clues) == [P]
    for whole in (blank * 81, "\n".join([empty] * 9)):
        assert encode_boards(NINE, parse_puzzles(lines(whole), "f").clues) == ["." * 81]


TABLES = {
    "sudoku-extreme": (f'source,question,answer,rating\n"a, b #3",{P},{S},0\n', 2, True),
    "index": (f"0,{P},{S}", 1, True),
    "index of pandas": (f",puzzle,solution\n0,{P},{S}", 2, True),
    "count of clues before the puzzle": (f"clues,puzzle,solution\n30,{P},{S}", 2, True),
    "id of many digits": (f"12345678901234567890,{P}", 1, False),
    "uuid": (f"550e8400-e29b-41d4-a716-446655440000,{P},{S}", 1, True),
    "long text before the board": (f"source,question,answer\n{'words ' * 50},{P},{S}\n", 2, True),
    "spaces after commas": (f"id, solution, puzzle\n1, {S}, {P}\n", 2, True),
    "unknown names": (f"a,b\n{P},{S}", 2, True),
    "one unknown name": (f"my boards\n{P}", 2, False),
    "names of another kind": (f"board,solved\n{P},{S}", 2, True),
    "solution first, named": (f"answer,question\n{S},{P}", 2, True),
    "solution first": (f"{S},{P}", 1, True),
    "another board that is no solution": (f"name,board,state\na,{P},{P}", 2, False),
    "tabs": (f"id\tpuzzle\tsolution\n1\t{P}\t{S}", 2, True),
    "semicolons": (f"{P};120;x y", 1, False),
    "semicolon and solution": (f"nr;puzzle;solution\n1;{P};{S}", 2, True),
    "spaces": (f"{P} {S}", 1, True),
    "rating": (f"{P} 7.2", 1, False),
    "comment after the board": (f"{P} # easy, they say", 1, False),
    "cells between commas": (",".join(P).replace(".", "0"), 1, False),
    "quoted": (f'"{P}", "{S}"', 1, True),
    "comments": (f"; one\n# two\n{P}\n;three", 3, False),
}


@pytest.mark.parametrize("layout", TABLES)
def test_tables(layout: str) -> None:
    text, line, solved = TABLES[layout]
    back = parse_puzzles(lines(text), "f")
    assert encode_boards(NINE, back.clues) == [P] and back.lines.tolist() == [line]
    assert (back.solutions is not None) == solved
    if back.solutions is not None:
        assert encode_boards(NINE, back.solutions) == [S]


@pytest.mark.parametrize("spec", [SIX, FOUR], ids=str)
def test_other_sizes(spec: SudokuSpec) -> None:
    made = generate(spec, 3, seed=1, clues=None)
    boards, answers = encode_boards(spec, made.clues), encode_boards(spec, made.solutions)
    rows = [[board[i : i + spec.size] for i in range(0, spec.cells, spec.size)] for board in boards]
    texts = [
        "\n".join(boards),
        "\n\n".join(map("\n".join, rows)),
        "\n".join(map("\n".join, rows)).replace(".", "-"),
        "\n".join(format_board(spec, board) for board in made.clues),
        "id,quiz,answer\n" + "\n".join(f"7,{b},{a}" for b, a in zip(boards, answers, strict=True)),
    ]
    for text in texts:
        back = parse_puzzles(lines(text), "f")
        assert back.spec == spec and encode_boards(spec, back.clues) == boards


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "p.csv").write_bytes(f"puzzle,solution{end}{P},{S}{end}".encode(encoding))
    back = read_puzzles(tmp_path / "p.csv")
    assert encode_boards(NINE, back.clues) == [P] and back.lines.tolist() == [2]
    assert encode_boards(NINE, parse_puzzles([f"\ufeff{P}\n"], "standard input").clues) == [P]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(ROWS[:8]), "f, line 8: the file ends inside the board that begins in line 1: it has 8"),
        (
            "\n".join([*ROWS[:4], "Grid 2", *ROWS]),
            "f, line 5: a heading inside the board that begins",
        ),
        (
            "\n".join([*ROWS[:4], "53..7...", *ROWS[5:]]),
            "f, line 5: 8 cells in this row; the board begins",
        ),
        (
            "\n".join([*ROWS[:4], "53..7..q.", *ROWS[5:]]),
            "f, line 5: 'q' at cell 8 of this row; accepted",
        ),
        ("\n".join(["q3..7....", *ROWS[1:]]), "f, line 1: 'q' at cell 1 of this row"),
        ("\n".join(["..7..."] * 6), "f, line 1: '7' at cell 3 of this row; accepted are 1..6"),
        (
            "1234567890\n" * 10,
            "f, line 1: 10 characters; a board has 81 (9x9), 36 (6x6) or 16 (4x4) in one line",
        ),
        (f"{P}\n53..7....\n", "f, line 2: the puzzle has 9 characters, 9x9 needs 81"),
        ("nr,name\n1,a", "f, line 2: no column of the header ('nr', 'name') holds a board here; expected a"),
        ("1,2,345", "f, line 1: none of the columns ('1', '2', '345') holds a board here"),
        (f"id,solution\n1,{S}", "f, line 2: only a solution is here"),
        (f"{P[:80]},{S}", "f, line 1: 80 characters"),
        ("hello\nworld, again", "f, line 2: no column of the header ('hello')"),
        ("+-------+\n", "f: no puzzles in this file"),
        ("\n".join([*ROWS[:8], "....8..77"]), "f, line 1: the clues contradict each other: 7 twice in row 9"),
    ],
)
def test_what_fits_no_layout_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_puzzles(lines(text), "f")
    assert str(error.value).startswith(message)
