"""What token ids look like: the text of each position, safe to show."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from loopmdm.data.sudoku import SudokuSpec
from loopmdm.data.tokenizer import Tokenizer

MASK_TEXT = "·"
UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
# C0 and C1 controls may do anything to a terminal; line separators and bidirectional overrides, to a layout.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with U+FFFD for every control character but newline and tab."""
    return _CONTROL.sub(UNPRINTABLE, text)


class Symbols(ABC):
    """How the tokens of one vocabulary are written."""

    separator = ""  # between positions of a line of text

    @abstractmethod
    def symbol(self, token: int) -> str | bytes:
        """A token as it stands after another one; bytes where it may be a part of a character."""

    def pieces(self, row: Sequence[int], mask_token_id: int) -> list[str]:
        """The text [L] of each position of a canvas.

        A character of several tokens stands at the last of them, the others are empty; so is padding, a
        negative token.
        """
        texts: list[str] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in row:
            symbol = MASK_TEXT if token == mask_token_id else self.symbol(token) if token >= 0 else ""
            if isinstance(symbol, bytes):
                texts.append(decoder.decode(symbol))
                continue
            if texts:
                texts[-1] += decoder.decode(b"", final=True)  # a character that was cut off
            texts.append(symbol)
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return [printable(text) for text in texts]


class TextSymbols(Symbols):
    """The tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str | bytes] = {}

    def symbol(self, token: int) -> str | bytes:
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> str | bytes:
        if token == self._tokenizer.eos_token_id:
            return "⟨eos⟩"
        if token == self._tokenizer.bos_token_id:
            return "⟨bos⟩"
        raw = self._tokenizer.token_bytes(token)
        if raw is not None:
            return raw
        # Decoders treat the first token in a way of its own: they drop its space, or keep a "##".
        alone = self._tokenizer.decode([token])
        return self._tokenizer.decode([token, token])[len(alone) :]


class IdSymbols(Symbols):
    """Ids as numbers, where no tokenizer is at hand."""

    separator = " "

    def symbol(self, token: int) -> str | bytes:
        return str(token)


class BoardSymbols(Symbols):
    """Digits of a Sudoku board."""

    def __init__(self, spec: SudokuSpec) -> None:
        self.spec = spec

    def symbol(self, token: int) -> str | bytes:
        return str(token + 1)
