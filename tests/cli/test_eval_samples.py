"""`loopmdm eval --samples`: the metrics of the samples that `loopmdm sample` draws, and what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loopmdm import ComputePlan, LoopMDM, sample
from loopmdm.data.text import read_documents, split_documents
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.quality import load_scorer, quality

from .conftest import Call


def test_samples_are_measured_for_each_loop_count(
    call: Call, text_run: Path, scorer: Path, corpus: Path
) -> None:
    words = ["--samples", 6, "--steps", 8, "--loops", "1,2", "--seed", 5, "--scorer", scorer, "--json"]
    done = call("eval", text_run, *words)
    assert done.status == 0, done.err
    document = done.json
    model, judge = LoopMDM.from_pretrained(text_run), load_scorer(scorer)
    one, two, held_out = document["rows"]
    for row, loops in ((one, 1), (two, 2)):
        result = sample(model, num_samples=6, length=32, steps=8, plan=loops, seed=5, progress=False)
        expected = quality(result.tokens, judge)
        assert {name: row[name] for name in expected} == expected
        assert (row["plan"], row["steps"], row["exact"]) == (f"S{loops}", 8, True)
        assert row["network_calls_per_sample"] == result.total_network_calls / 6
        assert row["executed"] == result.ledger.report()
    _, documents = split_documents(read_documents(corpus), 0.05)
    stream = [i for text in documents for i in (*ByteTokenizer().encode(text).tolist(), 256)]
    rows = torch.tensor([[256, *stream[at : at + 30], 256] for at in range(0, len(stream) - 29, 30)])
    picked = torch.linspace(0, len(rows) - 1, min(6, len(rows))).round().long()
    expected = quality(rows[picked], judge)
    assert {name: held_out[name] for name in expected} == expected
    about = document["samples"]
    assert (about["num"], about["length"], about["seed"], about["scorer"]) == (6, 32, 5, str(scorer))
    assert about["precision"]["network"] == "fp32" and about["flop_convention"] == "blocks+head"
    assert {"command", "date", "versions", "machine"} <= set(document)


def test_a_plan_and_no_scorer(call: Call, text_run: Path, tmp_path: Path) -> None:
    words = ["eval", text_run, "--samples", 4, "--length", 12, "--json"]
    plan = ComputePlan.parse("L4,H8", 1, 2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    first = call(*words, "--plan", "L4,H8", "--light", 1, "--heavy", 2).json
    second = call(*words, "--plan", tmp_path / "plan.json").json
    row = first["rows"][0]
    assert (row["plan"], row["steps"]) == (str(plan), 12) and "generative_perplexity" not in row
    result = sample(
        LoopMDM.from_pretrained(text_run), num_samples=4, length=12, steps=12, plan=plan, progress=False
    )
    assert row["unigram_entropy"] == quality(result.tokens)["unigram_entropy"]
    assert second["rows"][0]["executed"] == row["executed"]


def test_loops_that_stop_by_themselves(call: Call, text_run: Path) -> None:
    words = ["eval", text_run, "--samples", 3, "--steps", 4, "--json"]
    (row, _) = call(*words, "--plan", 2, "--adaptive", "inf").json["rows"]
    assert row["executed"]["mean_loops"] == 1.0
    (fixed, _) = call(*words, "--plan", 1).json["rows"]
    assert fixed["unigram_entropy"] == row["unigram_entropy"]


def test_the_table_says_what_the_figures_depend_on(call: Call, text_run: Path, scorer: Path) -> None:
    done = call("eval", text_run, "--samples", 3, "--steps", 4, "--dtype", "bf16", "--scorer", scorer)
    assert done.status == 0, done.err
    heading, _, *rows = done.out.splitlines()[2:7]
    assert all(
        name in heading for name in ("gen. PPL", "bits/byte", "distinct-2", "self-BLEU", "calls/sample")
    )
    assert [row.split("  ")[0] for row in rows] == ["plan S1", "plan S2", "held-out text"]
    assert all(row.count("±") == 6 for row in rows)
    for fact in (
        "3 samples of 32 tokens",
        "T = 4, seed 0",
        "bf16",
        "64 random bits",
        str(scorer),
        "blocks+head",
    ):
        assert fact in done.out


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["TEXT", "--scorer", "x"], 2, "--scorer: it belongs to --samples N"),
        (["TEXT", "--plan", "2"], 2, "--plan: it belongs to --samples N"),
        (["TEXT", "--min-loops", "2"], 2, "--min-loops: it belongs to --adaptive EPS or"),
        (["TEXT", "--samples", "2", "--loops", "1", "--adaptive", "0.1"], 2, "--plan, --loops: a plan says"),
        (["TEXT", "--samples", "1"], 2, "--samples: got 1, expected at least 2"),
        (["TEXT", "--samples", "0"], 2, "--samples: got '0'"),
        (["TEXT", "--samples", "2", "--plan", "2", "--loops", "1"], 2, "--plan, --loops: a plan says"),
        (["TEXT", "--samples", "2", "--plan", "L4,H8"], 2, "but light is not given"),
        (
            ["TEXT", "--samples", "2", "--plan", "S1:4,S2:4", "--steps", "9"],
            2,
            "covers 8 steps, but sampling",
        ),
        (["TEXT", "--samples", "2", "--light", "2"], 2, "--light, --heavy: they belong to a plan"),
        (["TEXT", "--samples", "2", "--scorer", "./nothing"], 1, "expected the folder of a scorer"),
        (["TEXT", "--samples", "2", "--scorer", "TEXT"], 1, "this is a diffusion model"),
        (["SUDOKU", "--samples", "2"], 2, "solves Sudoku; its measure is the share of puzzles solved"),
    ],
)
def test_bad_usage(
    call: Call, text_run: Path, sudoku_run: Path, words: list[str], status: int, message: str
) -> None:
    folders = {"TEXT": text_run, "SUDOKU": sudoku_run}
    done = call("eval", *(folders.get(word, word) for word in words))
    assert (done.status, done.out) == (status, "") and message in done.err, done.err
