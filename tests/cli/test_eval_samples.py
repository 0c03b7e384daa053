"""`loopmdm eval --samples`: the metrics of the samples that `loopmdm sample` draws, and what they cost."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from loopmdm import ComputePlan, LoopMDM, sample
from loopmdm.data.text import read_documents, split_documents
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.model.flops import head_flops, layer_flops
from loopmdm.quality import load_scorer, quality
from loopmdm.quality.causal import CausalLM
from loopmdm.quality.cost import cost_line
from loopmdm.sampling import Remasking

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
        (
            ["TEXT", "--samples", "2", "--loops", "1", "--adaptive", "0.1"],
            2,
            "--adaptive, --loops: a plan",
        ),
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
        (["SUDOKU", "--from-samples", "x"], 2, "error: --from-samples: "),
        (
            ["TEXT", "--samples", "2", "--steps", "2", "--threshold", "1"],
            2,
            "--steps: steps and threshold",
        ),
    ],
)
def test_bad_usage(
    call: Call, text_run: Path, sudoku_run: Path, words: list[str], status: int, message: str
) -> None:
    folders = {"TEXT": text_run, "SUDOKU": sudoku_run}
    done = call("eval", *(folders.get(word, word) for word in words))
    assert (done.status, done.out) == (status, "") and message in done.err, done.err


@pytest.mark.parametrize(
    "words, options",
    [
        (["--order", "random", "--tokens-per-step", 4], {"order": "random", "tokens_per_step": 4}),
        (
            [
                *[
                    "--order",
                    "confidence",
                    "--steps",
                    "8",
                    "--temperature",
                    "0",
                    "--plan",
                    "L4,H4",
                    "--light",
                    "1",
                    "--heavy",
                    "2",
                ]
            ],
            {"order": "confidence", "steps": 8, "temperature": 0.0, "plan": ComputePlan.parse("L4,H4", 1, 2)},
        ),
        (
            ["--order", "entropy", "--entropy-bound", 2.5, "--top-k", 9, "--block-length", 16],
            {"order": "entropy", "entropy_bound": 2.5, "top_k": 9, "block_length": 16},
        ),
        (["--steps", 12, "--remask", "cap", "--eta", 0.1], {"steps": 12, "remask": Remasking("cap", 0.1)}),
        (["--steps", 6, "--reference-numerics"], {"steps": 6, "reference_numerics": True}),
    ],
    ids=str,
)
def test_any_order_and_any_plan(
    call: Call, text_run: Path, words: list[object], options: dict[str, Any]
) -> None:
    given = ["eval", text_run, "--samples", 3, "--length", 16, "--seed", 4, *words]
    if "plan" not in options:
        given += ["--plan", 2]
    done = call(*given, "--json")
    assert done.status == 0, done.err
    row, about = done.json["rows"][0], done.json["samples"]
    plan = options.pop("plan", 2)
    model = LoopMDM.from_pretrained(text_run)
    result = sample(model, num_samples=3, length=16, seed=4, plan=plan, progress=False, **options)
    expected = quality(result.tokens)
    assert {name: row[name] for name in expected} == expected
    assert about["order"] == options.get("order", "ancestral")
    cost = row["cost"]
    assert cost["plan"] == str(result.plan) and cost["steps"] == result.num_steps
    assert cost["network_calls"] == result.total_network_calls and cost["seeds"] == {"samples": 4}
    assert cost["tokens_per_forward"] == 48 / result.total_network_calls
    assert cost["gflop_per_token"] == pytest.approx(result.ledger.flops() / 48 / 1e9)
    printed = call(*given).out
    assert cost_line(cost) in printed and f"{about['order']} order" in printed
    assert ("lost" in printed) == ("reference_numerics" in options)
    assert ("the most probable token" in printed) == (options.get("temperature") == 0)


def duos_perplexity(model: CausalLM, rows: list[list[int]], end: int) -> float:
    """Over all tokens but the first of a row, and ends behind the first end."""
    terms: list[float] = []
    for row in rows:
        nll = model.token_nll(torch.tensor([row]))[0].tolist()
        ends = 0
        for place, (token, value) in enumerate(zip(row, nll, strict=True)):
            ends += token == end
            if place and (token != end or ends == 1):
                terms.append(value)
    return math.exp(sum(terms) / len(terms))


def test_samples_are_written_and_read_back(call: Call, text_run: Path, scorer: Path, tmp_path: Path) -> None:
    file, judge = tmp_path / "samples.json", CausalLM.from_pretrained(scorer)
    words = ["eval", text_run, "--samples", 4, "--steps", 8, "--plan", 2, "--scorer", scorer, "--json"]
    file.write_text("mine")
    refused = call(*words, "--save-samples", file)
    assert refused.status == 2 and "is a file that holds no samples" in refused.err
    assert file.read_text() == "mine"
    file.write_text("")
    drawn = call(*words, "--save-samples", file)
    assert drawn.status == 0 and f"wrote {file}" in drawn.err
    document, row = json.loads(file.read_text()), drawn.json["rows"][0]
    assert list(document)[:3] == ["generative_ppl", "entropy", "generated_seqs"]
    model = LoopMDM.from_pretrained(text_run)
    rows = sample(model, num_samples=4, length=32, steps=8, plan=2, progress=False).tokens.tolist()
    assert document["token_ids"] == rows and document["cost"] == row["cost"]
    assert document["entropy"] == row["unigram_entropy"]["value"]
    assert document["generative_ppl"] == pytest.approx(duos_perplexity(judge, rows, 256), rel=1e-5)
    for text, ids in zip(document["generated_seqs"], rows, strict=True):
        assert text.count("<|endoftext|>") == ids.count(256)
    words = ["eval", text_run, "--from-samples", file, "--scorer", scorer]
    again = call(*words, "--json")
    assert again.status == 0, again.err
    (read, _) = again.json["rows"]
    same = ("unigram_entropy", "generative_perplexity", "bits_per_byte", "self_bleu", "duo", "cost")
    assert {name: read[name] for name in same} == {name: row[name] for name in same}
    assert read["stated"] == {name: document[name] for name in ("generative_ppl", "entropy")}
    printed = call(*words).out
    assert f"the file says generative_ppl {document['generative_ppl']:.5g}" in printed
    assert cost_line(row["cost"]) in printed


def test_samples_of_duo_are_read(call: Call, text_run: Path, scorer: Path, tmp_path: Path) -> None:
    """Texts alone, with the tokens that begin and end them written out."""
    file, end = tmp_path / "duo.json", "<|endoftext|>"
    texts = [f"{end}one and two{end}{end}three", f"{end}four five six seven", "no mark é"]
    rows = [
        [256, *b"one and two", 256, 256, *b"three"],
        [256, *b"four five six seven"],
        [*"no mark é".encode()],
    ]
    file.write_text(json.dumps({"generative_ppl": 31.5, "entropy": 2.5, "generated_seqs": texts}, indent=4))
    done = call("eval", text_run, "--from-samples", file, "--scorer", scorer, "--json")
    assert done.status == 0, done.err
    (row, _) = done.json["rows"]
    entropy = [sum(-n / len(r) * math.log(n / len(r)) for n in Counter(r).values()) for r in rows]
    assert row["duo"]["entropy"] == pytest.approx(sum(entropy) / 3)
    wanted = duos_perplexity(CausalLM.from_pretrained(scorer), rows, 256)
    assert row["duo"]["generative_ppl"] == pytest.approx(wanted, rel=1e-5)
    assert row["stated"] == {"generative_ppl": 31.5, "entropy": 2.5} and "cost" not in row
    # Duo scores as many tokens of a text as it drew, and a text may have more when it is encoded again.
    long = [[256, *b"and so on " * 9], [256, *b"two " * 20]]
    file.write_text(json.dumps({"generated_seqs": [end + bytes(ids[1:]).decode() for ids in long]}))
    for words, length in (([], 32), (["--length", 16], 16)):
        done = call("eval", text_run, "--from-samples", file, "--scorer", scorer, *words, "--json")
        assert done.status == 0, done.err
        wanted = duos_perplexity(CausalLM.from_pretrained(scorer), [ids[:length] for ids in long], 256)
        assert done.json["rows"][0]["duo"]["generative_ppl"] == pytest.approx(wanted, rel=1e-5)
    assert "the entropy is that of the texts' tokens" in call("eval", text_run, "--from-samples", file).out
    for content, message in (
        ("{", "duo.json: not JSON: Expecting"),
        ('["text"]', "no file of samples"),
        ('{"generated_seqs": ["a", 1]}', "no file of samples"),
        ('{"generated_seqs": ["abc", ""]}', "the text 1 is empty"),
    ):
        file.write_text(content)
        done = call("eval", text_run, "--from-samples", file)
        assert done.status == 1 and message in done.err, done.err


def test_mauve_beside_held_out_text(
    call: Call, text_run: Path, scorer: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in has the arguments of mauve-text; where that is installed, the value is its."""
    given: dict[str, Any] = {}

    def compute_mauve(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(mauve=0.25, frontier_integral=0.5, num_buckets=2)

    stand_in = ModuleType("mauve")
    monkeypatch.setattr(stand_in, "compute_mauve", compute_mauve, raising=False)
    words = ["eval", text_run, "--samples", 5, "--steps", 4, "--plan", 1, "--mauve", scorer]
    words += ["--data", corpus, "--part", "all"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "mauve", stand_in)
        document = call(*words, "--json").json
        printed = call(*words).out
    found = document["rows"][0]["mauve"]
    assert (found["value"], found["samples"], found["human"], found["buckets"]) == (0.25, 5, 5, 2)
    assert (found["featurizer"], found["max_text_length"], found["seed"]) == (str(scorer), 32, 25)
    assert "MAUVE of 5 samples beside 5 held-out texts" in printed and "32 tokens at most" in printed
    heading, _, drawn, *_ = printed.splitlines()[2:6]
    assert "MAUVE" in heading and "0.25" in drawn and "mauve" not in document["rows"][1]
    model = CausalLM.from_pretrained(scorer)
    tokens = sample(
        LoopMDM.from_pretrained(text_run), num_samples=5, length=32, steps=4, plan=1, progress=False
    ).tokens
    with torch.no_grad():
        wanted = model.norm_final(model.hidden(tokens))[:, -1]
    torch.testing.assert_close(torch.from_numpy(given["q_features"]), wanted, rtol=1e-4, atol=1e-5)
    assert given["p_features"].shape == wanted.shape and given["seed"] == 25
    if find_spec("mauve") is not None:
        from mauve import compute_mauve as theirs

        real = call(*words, "--json").json["rows"][0]["mauve"]
        again = theirs(p_features=given["p_features"], q_features=given["q_features"], seed=25)
        assert real["value"] == pytest.approx(again.mauve) and 0 < real["value"] <= 1
    monkeypatch.setitem(sys.modules, "mauve", None)
    done = call(*words)
    assert done.status == 1 and "MAUVE needs the package mauve-text: pip install mauve-text" in done.err


def test_likelihoods_and_puzzles_say_what_they_cost(call: Call, text_run: Path, sudoku_run: Path) -> None:
    words = ["eval", text_run, "--loops", "1,2", "--num-t", 3, "--windows", 4, "--seed", 6]
    printed, document = call(*words).out, call(*words, "--json").json
    model = LoopMDM.from_pretrained(text_run)
    for one, loops in zip(document["held_out"], (1, 2), strict=True):
        cost = one["cost"]
        assert (cost["plan"], cost["precision"], cost["steps"]) == (f"S{loops}", "fp32", 3)
        assert cost["network_calls"] == 12 and cost["seeds"] == {"masks": 6}
        assert cost["tokens_per_forward"] == one["num_tokens"] / 12
        blocks = 12 * 32 * (loops + 2) * layer_flops(model.config, 32)  # layers 0 and 2 run once
        rows = cost["gflop_per_token"] * 1e9 * one["num_tokens"] - blocks
        assert 0 < rows < 12 * 32 * head_flops(model.config)
        assert cost_line(cost) in printed
    exact = call(*words, "--method", "chain_rule", "--json").json["held_out"][0]["cost"]
    assert exact["seeds"] == {} and exact["tokens_per_forward"] == 1 and exact["steps"] == 32
    words = ["eval", sudoku_run, "--num", 3, "--num-t", 1, "--loops", 2, "--order", "confidence"]
    printed, document = call(*words).out, call(*words, "--json").json
    (solved,) = document["solved"]
    assert solved["cost"]["seeds"] == {"puzzles": 20000} and solved["cost"]["tokens_per_forward"] == 1
    assert solved["cost"]["network_calls"] == solved["network_calls"]
    assert f"confidence, {cost_line(solved['cost'])}" in printed
    assert cost_line(document["held_out"][0]["cost"]) in printed
    done = call(*words[:-1], "margin")
    assert done.status == 2 and "--order: got margin; of Sudoku, expected left_to_right" in done.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--order", "random"], "--order: it belongs to --samples N"),
        (["--temperature", "0.5"], "--temperature: it belongs to --samples N"),
        (["--forbid", "3"], "--forbid: it belongs to --samples N"),
        (["--save-samples", "x"], "--save-samples: it belongs to --samples N"),
        (["--from-samples", "x", "--steps", "3"], "--steps: of drawing samples, and --from-samples draws"),
        (["--from-samples", "x", "--loops", "2"], "--loops: of drawing samples"),
        (["--samples", "2", "--from-samples", "x"], "not allowed with argument"),
        (["--samples", "2", "--save-samples", "x"], "--save-samples: it keeps those of one plan"),
        (["--samples", "2", "--order", "both"], "--order: both is of Sudoku"),
        (["--samples", "2", "--order", "random", "--remask", "cap"], "remasking goes with the order ancest"),
        (["--samples", "2", "--eta", "0.1"], "--eta: it belongs to --remask"),
    ],
)
def test_options_that_do_not_go_together(call: Call, text_run: Path, words: list[str], message: str) -> None:
    done = call("eval", text_run, *words)
    assert (done.status, done.out) == (2, "") and message in done.err, done.err
