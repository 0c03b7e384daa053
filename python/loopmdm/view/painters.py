"""Draws the canvases of a run as lines of a terminal: text that fills in, or Sudoku boards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.text import Text

from loopmdm.data.sudoku import is_valid_solution
from loopmdm.view.replay import Replay
from loopmdm.view.symbols import MASK_TEXT, BoardSymbols, Symbols

# Colour-blind eyes keep the order from orange to blue; without colours, below one half is underlined.
CONFIDENCE = (
    (0.25, "#d55e00 underline"),
    (0.5, "#b97a00 underline"),
    (0.9, "#3b94d9"),
    (float("inf"), "#0072b2"),
)
GIVEN, MASKED, FRESH = "bold", "dim", " bold reverse"
_TAB = 4
_LOG_WIDTH = 160
_FEWEST_LINES = 4  # of one sample with its title


class Painter(ABC):
    """One kind of picture. `titles` names the sequences of the run, in their order."""

    def __init__(self, titles: Sequence[str], most: int | None = None) -> None:
        self.titles = titles
        self.most = len(titles) if most is None else min(most, len(titles))

    @abstractmethod
    def paint(self, replay: Replay, width: int, height: int) -> list[Text]:
        """The picture in at most `height` lines of at most `width` cells."""

    @abstractmethod
    def log_line(self, replay: Replay) -> str:
        """The first sequence in one line of plain text."""


class TextPainter(Painter):
    """Each sequence as wrapped text of which the end is shown, the first ones where not all have room."""

    def __init__(self, symbols: Symbols, titles: Sequence[str], most: int | None = None) -> None:
        super().__init__(titles, most)
        self._symbols = symbols

    def paint(self, replay: Replay, width: int, height: int) -> list[Text]:
        shown = max(1, min(self.most, height // _FEWEST_LINES))
        masks = replay.masked.sum(dim=1).tolist()
        picture: list[Text] = []
        for index in range(shown):
            room = max(1, (height - len(picture)) // (shown - index) - 1)
            lines = _wrap(self._styled(replay, index), width)
            hidden = len(lines) - room
            title = f"── {self.titles[index]}: {_left(masks[index])}"
            if hidden > 0:
                title += f", {hidden} lines above"
            if index == shown - 1 < len(self.titles) - 1:
                title += f" ({len(self.titles) - shown} more not shown)"
            picture.append(Text(title[:width], style="dim"))
            picture += lines[max(0, hidden) :]
        return picture[:height]

    def log_line(self, replay: Replay) -> str:
        text = "".join(text for text, _ in self._styled(replay, 0))
        text = text.replace("\n", "↵").replace("\t", "⇥")
        return text if len(text) <= _LOG_WIDTH else f"…{text[1 - _LOG_WIDTH :]}"

    def _styled(self, replay: Replay, index: int) -> Iterator[tuple[str, str]]:
        pieces = self._symbols.pieces(replay.tokens[index].tolist(), replay.mask_token_id)
        for piece, style in zip(pieces, _styles(replay, index), strict=True):
            yield piece, style
            if self._symbols.separator and piece:
                yield self._symbols.separator, ""


class BoardPainter(Painter):
    """Sudoku boards side by side, as many as have room."""

    def __init__(self, symbols: BoardSymbols, titles: Sequence[str], most: int | None = None) -> None:
        super().__init__(titles, most)
        self._symbols = symbols
        self._spec = symbols.spec

    def paint(self, replay: Replay, width: int, height: int) -> list[Text]:
        spec = self._spec
        box = 2 * spec.box_cols + 1
        board_width = max(spec.box_rows * (box + 1) + 1, *(len(title) + 14 for title in self.titles))
        across = max(1, (width + 3) // (board_width + 3))
        down = max(1, height // (spec.size + spec.size // spec.box_rows + 2))
        shown = min(self.most, across * down)
        picture: list[Text] = []
        for first in range(0, shown, across):
            boards = [self._board(replay, i, board_width) for i in range(first, min(first + across, shown))]
            picture += [Text("   ").join(row) for row in zip(*boards, strict=True)]
        for line in picture:
            line.truncate(width)
        return picture[:height]

    def log_line(self, replay: Replay) -> str:
        return "".join(self._symbols.pieces(replay.tokens[0].tolist(), replay.mask_token_id))

    def _board(self, replay: Replay, index: int, width: int) -> list[Text]:
        spec, tokens = self._spec, replay.tokens[index]
        digits = self._symbols.pieces(tokens.tolist(), replay.mask_token_id)
        styles = _styles(replay, index)
        left = int(replay.masked[index].sum())
        verdict = "solved" if is_valid_solution(spec, (tokens + 1).numpy()) else "wrong"
        rule = "+" + "+".join(["-" * (2 * spec.box_cols + 1)] * spec.box_rows) + "+"
        lines = [Text(f"{self.titles[index]}: {_left(left) if left else verdict}", style="dim")]
        for row in range(spec.size):
            if row % spec.box_rows == 0:
                lines.append(Text(rule))
            line = Text("|")
            for col in range(spec.size):
                cell = row * spec.size + col
                line.append(" ").append(digits[cell], styles[cell])
                if (col + 1) % spec.box_cols == 0:
                    line.append(" |")
            lines.append(line)
        lines.append(Text(rule))
        for line in lines:
            line.pad_right(width - line.cell_len)
        return lines


def legend(width: int | None = None) -> Text:
    """What the styles mean, in words that `width` cells have room for; below 31 cells its end is cut."""
    whole = _legend(("given", f"{MASK_TEXT} masked", "new"), "probability", "  ")
    if width is None or whole.cell_len <= width:
        return whole
    short = _legend(("given", MASK_TEXT, "new"), "p", " ")
    short.truncate(width)
    return short


def _legend(states: tuple[str, str, str], probability: str, gap: str) -> Text:
    text = Text()
    for name, style in zip(states, (GIVEN, MASKED, FRESH), strict=True):
        text.append(name, style).append(gap)
    text.append(f"{probability} ")
    below = 0.0
    for limit, style in CONFIDENCE:
        value = f"{limit if limit <= 1 else below:g}"
        sign = "<" if limit <= 1 else "≥"
        text.append(f"{sign} {value}" if len(gap) > 1 else f"{sign}{value.lstrip('0')}", style).append(gap)
        below = limit
    text.rstrip()
    return text


def _left(masks: int) -> str:
    return f"{masks} masked" if masks else "complete"


def _styles(replay: Replay, index: int) -> list[str]:
    """The style of each position of a sequence."""
    rows = (replay.given, replay.masked, replay.fresh, replay.confidence)
    styles = []
    for given, masked, fresh, confidence in zip(*(row[index].tolist() for row in rows), strict=True):
        if given:
            styles.append(GIVEN)
            continue
        style = MASKED if masked else next(style for limit, style in CONFIDENCE if confidence < limit)
        styles.append(style + FRESH if fresh else style)
    return styles


def _wrap(pieces: Iterator[tuple[str, str]], width: int) -> list[Text]:
    """Styled pieces in lines of `width` cells, broken anywhere: words would move as masks become spaces."""
    lines = [Text()]
    column = 0
    for piece, style in pieces:
        run = ""
        for character in piece:
            if character == "\t":
                character = " " * (_TAB - column % _TAB)
            cells = cell_len(character)
            if character == "\n" or column + cells > width:
                lines[-1].append(run, style)
                lines.append(Text())
                run, column = "", 0
                if character == "\n":
                    continue
            run += character
            column += cells
        lines[-1].append(run, style)
    return lines
