"""Options of decoding: the command line samples what the library does, and says what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loopmdm import LoopMDM, sample
from loopmdm.data.sudoku import SIX, encode_boards, generate
from loopmdm.sampling import Remasking

WAYS: list[tuple[list[str], dict[str, Any]]] = [
    (
        ["--order", "first_hitting", "--tokens-per-step", "2"],
        {"order": "first_hitting", "tokens_per_step": 2},
    ),
    (["--order", "margin", "--threshold", "0.01"], {"order": "margin", "threshold": 0.01}),
    (["--order", "entropy", "--entropy-bound", "9"], {"order": "entropy", "entropy_bound": 9.0}),
    (["--order", "random", "--window", "3"], {"order": "random", "window": 3}),
    (["--block-length", "4", "--steps", "9"], {"block_length": 4, "steps": 9}),
    (
        ["--order", "margin", "--steps", "5", "--counts", "llada"],
        {"order": "margin", "steps": 5, "counts": "llada"},
    ),
    (["--remask", "rescale", "--eta", "0.3"], {"remask": Remasking("rescale", 0.3)}),
    (["--remask", "loop"], {"remask": "loop"}),
    (
        ["--top-k", "5", "--top-p", "0.9", "--forbid", "32,101"],
        {"top_k": 5, "top_p": 0.9, "forbidden": [32, 101]},
    ),
    (["--reference-numerics"], {"reference_numerics": True}),
    (["--stop-at-eos"], {"eos_token_id": 256}),
]


@pytest.mark.parametrize(
    ("words", "options"), WAYS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_options_reach_the_library(call, text_run: Path, words: list[str], options: dict[str, Any]) -> None:
    done = call("sample", text_run, "--num", 2, "--length", 12, "--seed", 3, "--json", *words)
    assert done.status == 0, done.err
    expected = sample(
        LoopMDM.from_pretrained(text_run), num_samples=2, length=12, seed=3, progress=False, **options
    )
    rows = [row[:size] for row, size in zip(expected.tokens.tolist(), expected.lengths.tolist(), strict=True)]
    assert [s["ids"] for s in done.json["samples"]] == rows
    assert done.json["exact"] is expected.exact
    assert done.json["steps"] == expected.num_steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eta", "0.5"], "--eta: it belongs to --remask"),
        (["--remask", "cap", "--eta", "2"], "eta of the remasking must be in [0, 1]"),
        (["--remask", "cap", "--order", "random"], "remasking goes with the order ancestral"),
        (["--threshold", "0.5", "--steps", "4", "--order", "margin"], "steps and threshold are given"),
        (["--threshold", "0.5"], "threshold does not go with the order ancestral"),
        (["--order", "first_hitting", "--steps", "4"], "steps does not go with the order first_hitting"),
        (["--counts", "llada"], "counts does not go with the order ancestral"),
        (["--counts", "dream"], "invalid choice: 'dream'"),
        (
            ["--order", "margin", "--counts", "llada", "--threshold", "1"],
            "counts='llada' says how steps share positions, but threshold is given",
        ),
        (["--forbid", "a,b"], "expected token ids such as 5,17"),
        (["--forbid", "999"], "999 is no token id"),
        (["--window", "4", "--block-length", "4", "--order", "margin"], "blocks follow each other"),
        (["--reference-numerics", "--temperature", "0.5"], "temperature does not go with reference_numerics"),
        (["--length", "100000"], "a block_length lets it write longer sequences"),
    ],
)
def test_what_does_not_go_together(call, text_run: Path, tmp_path: Path, words, message) -> None:
    page = tmp_path / "page.html"
    done = call("sample", text_run, "--num", 1, *words, "--html", page)
    assert done.status == 2 and message in done.err and done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_boards_at_any_pace(call, sudoku_run: Path) -> None:
    board = encode_boards(SIX, generate(SIX, 1, seed=5, clues=None).clues)[0]
    blanks = board.count(".")
    words = ["solve", board, "--model", sudoku_run, "--loops", 1, "--json"]
    one = call(*words, "--order", "entropy").json["results"][0]
    assert (one["order"], one["network_calls"]) == ("entropy", blanks)
    four = call(*words, "--order", "margin", "--tokens-per-step", 4).json["results"][0]
    assert four["network_calls"] == -(-blanks // 4)
    everything = call(*words, "--order", "confidence", "--threshold", 0).json["results"][0]
    assert everything["network_calls"] == 1
    done = call(*words, "--order", "confidence", "--threshold", 0.5, "--tokens-per-step", 2)
    assert done.status == 2 and "tokens_per_step and threshold are given" in done.err
