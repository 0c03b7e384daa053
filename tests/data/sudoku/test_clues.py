"""One word for each meaning of clues, whatever it is given as."""

from __future__ import annotations

import numpy as np
import pytest

from loopmdm.data.sudoku import NINE, SIX, generate
from loopmdm.data.sudoku.clues import as_clues, parse_clues


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "minimal"),
        ("minimal", "minimal"),
        ("none", "full"),
        ("full", "full"),
        ((10, 16), (10, 16)),
        ([10, 16], (10, 16)),
    ],
)
def test_spellings(given, meant) -> None:
    assert as_clues(SIX, given) == meant


@pytest.mark.parametrize(
    ("text", "meant"), [("minimal", "minimal"), ("none", "full"), ("full", "full"), ("10:16", (10, 16))]
)
def test_spellings_of_the_command_line(text, meant) -> None:
    assert parse_clues(text, SIX) == meant


@pytest.mark.parametrize(
    "text", ["", "7:4", "16:10", "4:8", "8:37", "-1:9", "8", "8:", "all", "Full", "(8, 9)"]
)
def test_other_texts_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"--clues: got .*with 8 <= LO <= HI <= 36"):
        parse_clues(text, SIX)


def test_the_generator_knows_the_words() -> None:
    for one, other in (("minimal", None), ("full", (81, 81)), ("none", (81, 81))):
        made, again = (generate(NINE, 3, seed=2, clues=clues) for clues in (one, other))
        np.testing.assert_array_equal(made.clues, again.clues)
    with pytest.raises(ValueError, match=r"clues must be .* got 'all'"):
        generate(NINE, 1, seed=0, clues="all")
