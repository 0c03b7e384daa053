"""`loopmdm eval` and `loopmdm sample`: figures and tokens are those of the library."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch

from loopmdm import ComputePlan, LoopMDM, sample
from loopmdm.data.sudoku import SIX, encode_boards, generate, write_puzzles
from loopmdm.data.text import read_documents, split_documents
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.runs import text_data

from .conftest import Call


def test_eval_measures_the_documents_the_run_held_out(call: Call, text_run: Path, corpus: Path) -> None:
    done = call("eval", text_run, "--loops", "1,2", "--num-t", 2, "--windows", 3, "--json")
    assert done.status == 0, done.err
    _, held_out = split_documents(read_documents(corpus), 0.05)
    tokenizer = ByteTokenizer()
    data = text_data.TextData.from_documents(held_out, tokenizer, 32)
    rows = [0, round((len(data) - 1) / 2), len(data) - 1]
    tokens = torch.cat([data.examples(row, row + 1)[0] for row in rows])
    bytes_per_token = int((tokens < 256).sum()) / tokens.numel()
    expected = evaluate_nll(
        LoopMDM.from_pretrained(text_run),
        [tokens],
        num_loops=[1, 2],
        num_t=2,
        bytes_per_token=bytes_per_token,
    )
    document = done.json
    assert (document["part"], document["data"], document["length"]) == ("validation", str(corpus), 32)
    for got, wanted in zip(document["held_out"], expected, strict=True):
        assert {name: got[name] for name in wanted.to_dict()} == wanted.to_dict()
        assert got["perplexity_stderr"] == wanted.perplexity * wanted.stderr
        assert got["bits_per_byte_stderr"] / got["bits_per_byte"] == pytest.approx(wanted.stderr / wanted.nll)


@pytest.mark.parametrize("order", [None, "random", "confidence"])
def test_eval_by_the_chain_rule(call: Call, text_run: Path, order: str | None) -> None:
    words = ["eval", text_run, "--loops", 2, "--windows", 2, "--method", "chain_rule", "--num-t", 2, "--json"]
    done = call(*words, *(["--chain-order", order] if order else []))
    assert done.status == 0, done.err
    assert "each token of 2 windows of 32 tokens" in done.err
    (got,) = done.json["held_out"]
    (bound,) = call("eval", text_run, "--loops", 2, "--windows", 2, "--json").json["held_out"]
    assert (got["method"], got["num_t"], bound["method"]) == (
        "chain_rule",
        2 if order == "random" else 1,
        "stratified",
    )
    assert got["num_tokens"] == bound["num_tokens"] == 64
    assert got["nll"] == pytest.approx(bound["nll"], rel=0.2)  # of a model that has learned next to nothing


def test_eval_of_an_order_without_the_chain_rule_is_bad_usage(call: Call, text_run: Path) -> None:
    done = call("eval", text_run, "--method", "mc", "--chain-order", "random")
    assert done.status == 2 and "order: given with method 'mc'; it belongs to 'chain_rule'" in done.err
    done = call("eval", text_run, "--method", "chain")
    assert done.status == 2 and "did you mean" in done.err


def test_eval_of_other_text_takes_all_of_it(call: Call, text_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.txt"
    file.write_text("Other text. " * 40)
    done = call("eval", text_run, "--data", file, "--num-t", 1)
    assert done.status == 0 and f"all documents of {file}" in done.out
    heading, _, *rows = done.out.splitlines()[2:6]
    assert heading.split()[:3] == ["loops", "S", "NLL/token"] and "bits/byte" in heading
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert all(len(row.split()) == 7 for row in rows)


def test_eval_of_sudoku(call: Call, sudoku_run: Path, tmp_path: Path) -> None:
    words = ["--loops", "1,6", "--num-t", 1, "--order", "confidence", "--json"]
    done = call("eval", sudoku_run, "--num", 3, *words)
    assert done.status == 0, done.err
    document = done.json
    assert document["puzzles"] == 3 and document["size"] == "6x6"
    assert [(s["order"], s["num_loops"]) for s in document["solved"]] == [
        ("confidence", 1),
        ("confidence", 6),
    ]
    assert [r["num_loops"] for r in document["held_out"]] == [1, 6]
    assert all(0 < r["nll"] < 5 and r["bits_per_byte"] is None for r in document["held_out"])
    puzzles = generate(SIX, 2, seed=5, clues=None)
    write_puzzles(tmp_path / "a.txt", SIX, puzzles.clues)
    write_puzzles(tmp_path / "b.csv", SIX, puzzles.clues, puzzles.solutions)
    plain, solved = (
        call("eval", sudoku_run, "--puzzles", tmp_path / name, *words).json for name in ("a.txt", "b.csv")
    )
    assert plain["held_out"] == solved["held_out"] and plain["puzzles"] == 2
    blanks = sum(board.count(".") for board in encode_boards(SIX, puzzles.clues))
    assert plain["held_out"][0]["num_tokens"] == blanks


def test_eval_with_loops_that_stop_by_themselves(call: Call, text_run: Path, sudoku_run: Path) -> None:
    words = ["eval", text_run, "--num-t", 2, "--windows", 4]
    (one,) = call(*words, "--loops", 1, "--json").json["held_out"]
    (stopped,) = call(*words, "--adaptive", "inf", "--json").json["held_out"]
    assert one["mean_loops"] is None and stopped["mean_loops"] == 1 and stopped["num_loops"] == 2
    assert stopped["nll"] == pytest.approx(one["nll"], rel=1e-6)
    done = call(*words, "--criterion", "argmax", "--loops", "2")
    heading, _, row, *_ = done.out.splitlines()[2:]
    assert heading.endswith("mean loops") and 1 <= float(row.split()[-1]) <= 2
    words = ["eval", sudoku_run, "--num", 3, "--num-t", 1, "--adaptive", "0.5", "--json"]
    document = call(*words, "--min-loops", 2, "--loops", 4).json
    assert {one["plan"] for one in document["solved"]} == {"adaptive(eps=0.5, max_loops=4, min_loops=2)"}
    assert 2 <= document["held_out"][0]["mean_loops"] <= 4
    done = call("eval", text_run, "--adaptive", "0.1", "--plan", "2")
    assert done.status == 2 and "--plan: it belongs to --samples N" in done.err
    done = call("eval", text_run, "--criterion", "output")
    assert done.status == 2 and "needs a threshold" in done.err


def test_puzzles_without_one_solution_are_left_out(
    call: Call, tmp_path: Path, sudoku_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    puzzles = generate(SIX, 2, seed=5, clues=None)
    several, none = "." * 36, "12345." + "." * 17 + "6" + "." * 12
    boards = encode_boards(SIX, puzzles.clues)
    (tmp_path / "plain.txt").write_text("\n".join(boards))
    (tmp_path / "mixed.txt").write_text("\n".join([boards[0], several, none, boards[1]]))
    words = ["--loops", 1, "--order", "confidence", "--num-t", 2]
    plain = call("eval", sudoku_run, "--puzzles", tmp_path / "plain.txt", *words, "--json").json
    done = call("eval", sudoku_run, "--puzzles", tmp_path / "mixed.txt", *words, "--json")
    assert done.json["puzzles"] == 2 and done.json["held_out"] == plain["held_out"]
    assert "1 puzzle has no solution, not counted below: line 3" in done.err
    assert "1 puzzle has several solutions, not counted below: line 2" in done.err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(boards)))
    piped = call("eval", sudoku_run, "--puzzles", "-", *words, "--json").json
    assert piped["held_out"] == plain["held_out"]
    (tmp_path / "none.txt").write_text(none)
    refused = call("eval", sudoku_run, "--puzzles", tmp_path / "none.txt", *words)
    assert refused.status == 1 and "none.txt: no puzzle with exactly one solution" in refused.err


def test_sample_writes_what_the_library_samples(call: Call, text_run: Path) -> None:
    words = [
        "--num",
        2,
        "--length",
        12,
        "--seed",
        3,
        "--prompt",
        "Te",
        "--plan",
        "L4,H8",
        "--light",
        1,
        "--heavy",
        2,
    ]
    done = call("sample", text_run, *words, "--steps", 12, "--temperature", 0.7, "--json")
    assert done.status == 0, done.err
    tokenizer = ByteTokenizer()
    expected = sample(
        LoopMDM.from_pretrained(text_run),
        num_samples=2,
        length=12,
        steps=12,
        seed=3,
        prompt=[256, *b"Te"],
        plan=ComputePlan.parse("L4,H8", 1, 2),
        temperature=0.7,
    )
    document = done.json
    assert [s["ids"] for s in document["samples"]] == expected.tokens.tolist()
    assert [s["text"] for s in document["samples"]] == [tokenizer.decode(row) for row in expected.tokens]
    assert document["network_calls"] == expected.network_calls.tolist()
    assert document["loops"] == expected.loops.tolist()
    assert (document["order"], document["seed"], document["length"], document["steps"]) == (
        "ancestral",
        3,
        12,
        12,
    )


def test_infill_keeps_the_text_around_the_gaps(call: Call, text_run: Path) -> None:
    done = call(
        "sample", text_run, "--num", 1, "--infill", "a ____ b [MASK]c _ __", "--order", "confidence", "--json"
    )
    ids = done.json["samples"][0]["ids"]
    assert ids[0] == ids[-1] == 256 and len(ids) == 2 + len("a xxxx b xc _ __")
    assert bytes(ids[1:3]) == b"a " and bytes(ids[7:10]) == b" b " and bytes(ids[11:-1]) == b"c _ __"


def test_without_a_tokenizer_ids_are_written(call: Call, sudoku_run: Path) -> None:
    done = call("sample", sudoku_run, "--num", 1, "--prompt", "0 1 2", "--order", "left_to_right")
    assert done.status == 0 and "token ids: a digit less one" in done.err
    assert done.out.splitlines()[2].startswith("| 1 2 3 | ")
    done = call(
        "sample", sudoku_run, "--num", 1, "--prompt", "0 1 2", "--length", 10, "--order", "left_to_right"
    )
    ids = done.out.splitlines()[1].split()
    assert ids[:3] == ["0", "1", "2"] and len(ids) == 10 and set(ids) <= set("012345")
    document = call("sample", sudoku_run, "--num", 1, "--infill", "3 ___ 4", "--dtype", "bf16", "--json").json
    ids = document["samples"][0]["ids"]
    assert (ids[0], ids[-1], len(ids)) == (3, 4, 5) and document["samples"][0]["text"] is None


def test_a_model_of_boards_writes_boards(call: Call, sudoku_run: Path) -> None:
    words = ["sample", sudoku_run, "--num", 2, "--seed", 3, "--order", "confidence"]
    document = call(*words, "--json").json
    done = call(*words)
    assert done.status == 0 and "token" not in done.err
    lines = done.out.splitlines()
    assert len(lines) == 2 * (1 + 6 + 4)  # a board of 6x6 has three boxes one under another
    for index, one in enumerate(document["samples"]):
        title, *board = lines[11 * index : 11 * (index + 1)]
        digits = "".join(character for line in board for character in line if character.isdecimal())
        assert digits == one["board"] == "".join(str(token + 1) for token in one["ids"])
        grid = [digits[6 * row : 6 * row + 6] for row in range(6)]
        boxes = ["".join(grid[r + i][c : c + 3] for i in range(2)) for r in (0, 2, 4) for c in (0, 3)]
        valid = all(len(set(unit)) == 6 for unit in [*grid, *map("".join, zip(*grid, strict=True)), *boxes])
        assert one["valid"] is valid
        assert title == f"--- sample {index + 1} of 2: {'a' if valid else 'no'} valid board ---"


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "TEXT", "--num", "1", "--length", "4", "--loops", "99"],
        ["sample", "TEXT", "--num", "1", "--length", "4", "--plan", "S99:2,S1:2"],
        ["sample", "TEXT", "--num", "1", "--length", "4", "--loops", "99", "--adaptive", "inf"],
        ["eval", "TEXT", "--loops", "1,99", "--num-t", "1", "--windows", "2"],
        ["eval", "TEXT", "--samples", "2", "--loops", "99", "--steps", "1", "--length", "4"],
        ["solve", "53...." + "." * 30, "--model", "BOARDS", "--loops", "1,99"],
    ],
)
def test_more_loops_than_in_training_are_said(
    call: Call, text_run: Path, sudoku_run: Path, words: list[str]
) -> None:
    names = {"TEXT": text_run, "BOARDS": sudoku_run}
    done = call(*[names.get(word, word) for word in words])
    assert done.status == 0, done.err
    trained = 6 if words[0] == "solve" else 2
    note = f"note: S = 99 is beyond the S = {trained} of training: it runs, and may do better or worse\n"
    assert done.err.count(note) == 1
    within = call(*[names.get(word, word.replace("99", "2")) for word in words])
    assert within.status == 0 and "beyond" not in within.err


def test_control_characters_do_not_reach_the_terminal(call: Call, text_run: Path) -> None:
    done = call("sample", text_run, "--num", 3)
    assert done.status == 0 and done.out.startswith("--- sample 1 of 3 ---\n")
    assert all(c in "\n\t" or (c.isprintable() or ord(c) >= 160) for c in done.out)


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["sample", "TEXT", "--plan", "0"], 2, "loops must be at least 1, got 0"),
        (["sample", "TEXT", "--plan", "X3"], 2, "cannot read 'X3' in the plan"),
        (["sample", "TEXT", "--plan", "L3,H3"], 2, "the plan uses light, but light is not given"),
        (["sample", "TEXT", "--plan", "2", "--light", "1"], 2, "--light, --heavy: they belong to a plan"),
        (["sample", "TEXT", "--plan", "S2:3"], 0, None),
        (["sample", "TEXT", "--plan", "S2:3", "--steps", "4"], 2, "covers 3 steps, but sampling takes 4"),
        (
            ["sample", "TEXT", "--cuda-graphs"],
            2,
            "cuda_graphs: they need a CUDA device, and the model is on cpu",
        ),
        (["sample", "TEXT", "--length", "33"], 2, "length is 33, but the model's max_length is 32"),
        (["sample", "TEXT", "--prompt", "x" * 40], 2, "--prompt: it is 41 tokens long"),
        (["sample", "TEXT", "--infill", "no gap"], 2, "--infill: no gap in 'no gap'"),
        (["sample", "TEXT", "--prompt", "a", "--infill", "b"], 2, "not allowed with argument"),
        (["sample", "TEXT", "--top-p", "0"], 2, "top_p: got 0.0, expected 0 < top_p <= 1"),
        (["sample", "TEXT", "--temperature", "-1"], 2, "--temperature: got '-1'"),
        (["sample", "TEXT", "--order", "odd"], 2, "invalid choice: 'odd'"),
        (["sample", "TEXT", "--num", "0"], 2, "--num: got '0'"),
        (["sample", "SUDOKU", "--prompt", "abc"], 2, "expected ids such as '5 17 3', got 'abc'"),
        (["sample", "SUDOKU", "--prompt", "6"], 2, "contains the mask token id 6"),
        (["sample", "SUDOKU", "--tokenizer", "byte"], 1, "258 tokens and mask id 257"),
        (["sample", "nothere"], 1, "expected a checkpoint folder or a hub id"),
        (["sample", "sudok9"], 1, "or a hub id such as 'owner/name'; did you mean 'sudoku9'?"),
        (["eval", "TEXT", "--loops", "1,1025"], 2, "--loops: got '1025', expected an integer at most 1024"),
        (["eval", "SUDOKU", "--loops", "1025"], 2, "--loops: got '1025', expected an integer at most 1024"),
        (
            ["eval", "TEXT", "--samples", "2", "--loops", "1025"],
            2,
            "--loops: got '1025', expected an integer at most 1024",
        ),
        (["eval", "TEXT", "--samples", "2", "--method", "mc"], 2, "--method, --chain-order"),
        (["sample", "TEXT", "--loops", "1025"], 2, "loops must be in 1..1024, got 1025"),
        (["sample", "EMPTY"], 1, "has no config.json"),
        (["eval", "TEXT", "--loops", "0"], 2, "--loops: got '0', expected loop counts such as 1,3,6"),
        (["eval", "TEXT", "--loops", "1,,2"], 2, "--loops: got ''"),
        (
            ["eval", "TEXT", "--data", "nothere"],
            1,
            "nothere' does not exist; accepted: a file, a folder or 'stdlib'",
        ),
        (["eval", "TEXT", "--puzzles", "x"], 2, "--puzzles: TEXT is a model of text"),
        (["eval", "TEXT", "--length", "64"], 1, "length 64 is beyond max_length 32"),
        (["eval", "SUDOKU", "--data", "x"], 2, "--data: SUDOKU solves 6x6 Sudoku"),
        (["eval", "SUDOKU", "--puzzles", "nothere"], 1, "nothere: No such file or directory"),
        (["eval", "nothere"], 1, "expected a checkpoint folder or a hub id"),
    ],
)
def test_bad_input(
    call: Call,
    tmp_path: Path,
    text_run: Path,
    sudoku_run: Path,
    words: list[str],
    status: int,
    message: str | None,
) -> None:
    places = {"TEXT": str(text_run), "SUDOKU": str(sudoku_run), "EMPTY": str(tmp_path)}
    done = call(*(places.get(word, word) for word in words))
    if message is None:  # a plan of its own length is fine
        assert done.status == 0
        return
    for name, place in places.items():
        message = message.replace(name, place)
    assert done.status == status and done.out == "", done.err
    assert message in done.err and "Traceback" not in done.err


def test_damaged_models(call: Call, tmp_path: Path, text_run: Path) -> None:
    cut = shutil.copytree(text_run, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    other = shutil.copytree(text_run, tmp_path / "other")
    config = (other / "config.json").read_text().replace('"hidden_size": 16', '"hidden_size": 32')
    (other / "config.json").write_text(config)
    bare = shutil.copytree(text_run, tmp_path / "bare")
    (bare / "run.json").unlink()
    for command in ("sample", "eval"):
        for folder, message in (
            (cut, "is not a whole safetensors file"),
            (other, "tensors do not fit the model"),
        ):
            done = call(command, folder)
            assert done.status == 1 and message in done.err and "Traceback" not in done.err
    done = call("eval", bare)
    assert done.status == 2 and "does not say what it was trained on" in done.err


def test_weights_that_are_not_finite(call: Call, tmp_path: Path, text_run: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(text_run, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["output_layer.linear.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    done = call("sample", folder)
    assert done.status == 1 and "output_layer.linear.bias holds 1 values that are NaN" in done.err
