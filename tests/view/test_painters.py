"""Frames hold what the canvas holds, in the room there is."""

from __future__ import annotations

import pytest
import torch
from rich.text import Text

from loopmdm import LoopMDM, sample
from loopmdm.data.sudoku import SIX, format_board, generate
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.sampling import StepEvent
from loopmdm.view import BoardSymbols, IdSymbols, Replay, TextSymbols
from loopmdm.view.painters import BoardPainter, TextPainter, legend

from .conftest import event


def plain(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]


def test_the_text_of_each_frame_is_the_canvas(model: LoopMDM) -> None:
    tokenizer = ByteTokenizer()
    symbols = TextSymbols(tokenizer)
    painter = TextPainter(symbols, ["one", "two"])
    canvas = torch.full((2, 20), 257)
    canvas[:, :3] = torch.tensor(list(b"abc"))
    replay = Replay(canvas, 257)
    seen: list[list[str]] = []

    def frame(change: StepEvent) -> None:
        replay.apply(change)
        lines = plain(painter.paint(replay, width=400, height=200))
        split = next(i for i, line in enumerate(lines) if line.startswith("── two: "))
        texts = ["".join(symbols.pieces(row, 257)).expandtabs(4) for row in replay.tokens.tolist()]
        assert lines[1:split] == texts[0].split("\n") and lines[split + 1 :] == texts[1].split("\n")
        left = int(replay.masked[0].sum())
        assert lines[0] == f"── one: {f'{left} masked' if left else 'complete'}"
        seen.append(lines)

    sample(model, infill=canvas, order="confidence", remask=None, on_step=frame, progress=False)
    assert len(seen) == 17 and "·" not in "".join(seen[-1])


def test_tokens_masked_again_are_masks_in_the_next_frame() -> None:
    replay = Replay(torch.full((1, 4), 257), 257)
    painter = TextPainter(TextSymbols(ByteTokenizer()), ["one"])
    for change, expected in [
        (event(0, (0, 1, 66, 0.3, 1)), "·B··"),
        (event(1, (0, 0, 65, 0.9, 1), (0, 1, 257, 0.0, 1)), "A···"),
        (event(2, (0, 1, 67, 0.9, 1)), "AC··"),
    ]:
        replay.apply(change)
        assert plain(painter.paint(replay, 80, 24)) == [f"── one: {expected.count('·')} masked", expected]


def test_styles_tell_given_masked_new_and_sure() -> None:
    replay = Replay(torch.tensor([[65, 257, 257, 257, 257]]), 257)
    replay.apply(event(0, (0, 1, 66, 0.1, 1), (0, 2, 67, 0.95, 1)))
    replay.apply(event(1, (0, 3, 68, 0.6, 1)))
    (line,) = TextPainter(TextSymbols(ByteTokenizer()), ["one"]).paint(replay, 80, 24)[1:]
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles == {
        "A": "bold",
        "B": "#d55e00 underline",
        "C": "#0072b2",
        "D": "#3b94d9 bold reverse",
        "·": "dim",
    }
    whole = "given  · masked  new  probability < 0.25  < 0.5  < 0.9  ≥ 0.9"
    assert legend().plain == legend(100).plain == legend(len(whole)).plain == whole
    assert legend(40).plain == legend(len(whole) - 1).plain == "given · new p <.25 <.5 <.9 ≥.9"
    assert [str(span.style) for span in legend(40).spans] == [str(span.style) for span in legend().spans]
    assert legend(12).plain == "given · new "


@pytest.mark.parametrize("width, height", [(1, 1), (7, 3), (20, 10), (33, 24)])
def test_pictures_stay_in_their_room(width: int, height: int) -> None:
    text = "word\tand 日本語 over\nlines " * 30
    row = torch.tensor(list(text.encode()))
    replay = Replay(row.repeat(5, 1), 257)
    painter = TextPainter(TextSymbols(ByteTokenizer()), [f"sample {i}" for i in range(5)])
    lines = painter.paint(replay, width, height)
    assert len(lines) <= height and all(line.cell_len <= max(width, 2) for line in lines)
    boards = Replay(torch.zeros(4, 36, dtype=torch.int64), 6)
    lines = BoardPainter(BoardSymbols(SIX), ["a", "b", "c", "d"]).paint(boards, width, height)
    assert len(lines) <= height and all(line.cell_len <= width for line in lines)


def test_the_end_of_long_texts_is_shown_and_the_first_samples() -> None:
    replay = Replay(torch.tensor([list(b"0123456789" * 10)] * 9), 257)
    painter = TextPainter(TextSymbols(ByteTokenizer()), [f"s{i}" for i in range(9)])
    lines = plain(painter.paint(replay, 30, 8))
    assert lines == [
        "── s0: complete, 1 lines above",
        "0" + "123456789" + "0123456789" * 2,
        "0123456789" * 3,
        "0123456789",
        "── s1: complete, 1 lines above",
        "0123456789" * 3,
        "0123456789" * 3,
        "0123456789",
    ]
    wide = plain(painter.paint(replay, 120, 8))
    assert wide[2] == "── s1: complete (7 more not shown)" and wide[3] == "0123456789" * 10
    assert len(plain(TextPainter(TextSymbols(ByteTokenizer()), ["s0"] * 9, 1).paint(replay, 120, 40))) == 2


def test_a_line_for_logs() -> None:
    symbols = TextSymbols(ByteTokenizer())
    replay = Replay(torch.tensor([list(b"a\nb\tc\x1b")]), 257)
    assert TextPainter(symbols, ["s"]).log_line(replay) == "a↵b⇥c\ufffd"
    long = TextPainter(symbols, ["s"]).log_line(Replay(torch.tensor([list(b"x" * 500 + b"end")]), 257))
    assert len(long) == 160 and long.startswith("…x") and long.endswith("end")
    assert TextPainter(IdSymbols(), ["s"]).log_line(Replay(torch.tensor([[1, 22, 9]]), 9)) == "1 22 · "


def test_boards() -> None:
    puzzles = generate(SIX, 3, seed=1, clues=(20, 25))
    canvas = torch.from_numpy(puzzles.clues.astype("int64") - 1)
    canvas[canvas < 0] = 6
    replay = Replay(canvas, 6)
    painter = BoardPainter(BoardSymbols(SIX), ["line 1", "line 2", "line 3"])
    lines = plain(painter.paint(replay, 120, 40))
    expected = [format_board(SIX, clues).replace(".", "·").splitlines() for clues in puzzles.clues]
    assert len(lines) == 1 + len(expected[0])
    for line, parts in zip(lines[1:], zip(*expected, strict=True), strict=True):
        assert line.split() == " ".join(parts).split()
    left = (puzzles.clues[0] == 0).sum()
    assert lines[0].startswith(f"line 1: {left} masked")
    narrow = plain(painter.paint(replay, 30, 24))  # one beside another has no room, two below one another do
    assert [line.split(":")[0] for line in narrow if "masked" in line] == ["line 1", "line 2"]
    replay.tokens = torch.from_numpy(puzzles.solutions.astype("int64") - 1)
    replay.tokens[2, 0] = (replay.tokens[2, 0] + 1) % 6
    titles = plain(painter.paint(replay, 120, 40))[0].split("line")
    assert [title.split()[-1] for title in titles[1:]] == ["solved", "solved", "wrong"]
    digits = "".join(str(d) for d in puzzles.solutions[0])
    assert painter.log_line(replay) == digits
