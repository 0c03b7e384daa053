"""lm-evaluation-harness runs tasks made of local files, and its figures are those of the library."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm import LoopMDM, LoopMDMConfig, likelihood, sample
from loopmdm.cli import main
from loopmdm.data.tokenizer import ByteTokenizer

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
LENGTH = 24
ROWS = [
    {
        "question": "two and two",
        "choices": ["four", "a fish"],
        "label": 0,
        "text": "A text of more than 24 bytes.",
    },
    {"question": "up or", "choices": ["down", "so"], "label": 0, "text": "short"},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "text",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes with its tokenizer, and tasks."""
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("run"), ByteTokenizer()
    sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "num_layers": 3, "cond_dim": 8, "loop_end": 2}
    config = LoopMDMConfig(
        tokenizer.vocab_size, tokenizer.mask_token_id, max_length=LENGTH, max_loops=2, **sizes
    )
    model = LoopMDM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(path)
    tokenizer.save(path)
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, task in TASKS.items():
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / "rows.jsonl")}},
        }
        (path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **source, **task}))
    return path


def encode(text: str) -> list[int]:
    ids: list[int] = ByteTokenizer().encode(text).tolist()
    return ids


def log_prob(model: LoopMDM, context: list[int], continuation: list[int], **options: Any) -> float:
    tokens = torch.tensor([context + continuation])
    given = torch.arange(tokens.shape[1])[None] < len(context)
    with torch.no_grad():
        return float(likelihood(model, tokens, given, **options).log_prob)


@needs_harness
@pytest.mark.parametrize(
    "options", [{"method": "chain_rule"}, {"method": "mc", "samples": 3, "num_loops": 1}]
)
def test_tasks_of_local_files(folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import loopmdm.harness  # noqa: F401

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": folder, **options}.items())
    found = simple_evaluate(
        "loopmdm",
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=5,
        device="cpu",
        bootstrap_iters=0,
    )
    model = LoopMDM.from_pretrained(folder)
    responses = {name: [sample["resps"] for sample in found["samples"][name]] for name in TASKS}
    for row, answers in zip(ROWS, responses["choice"], strict=True):
        for choice, ((got, greedy),) in zip(row["choices"], answers, strict=True):
            context, continuation = encode(row["question"]), encode(f" {choice}")
            assert float(got) == pytest.approx(log_prob(model, context, continuation, **options), rel=1e-5)
            assert str(greedy) == "False"
    bos = ByteTokenizer().bos_token_id
    long, short = encode(ROWS[0]["text"]), encode(ROWS[1]["text"])
    parts = [([bos], long[: LENGTH - 1]), (long[-LENGTH : LENGTH - 1], long[LENGTH - 1 :])]
    wanted = [
        sum(log_prob(model, *part, **options) for part in parts),
        log_prob(model, [bos], short, **options),
    ]
    got = [
        float(answer[0][0]) if isinstance(answer[0], list | tuple) else float(answer[0])
        for answer in responses["rolling"]
    ]
    assert got == pytest.approx(wanted, rel=1e-5)
    loops = options.get("num_loops", 2)
    for row, ((text,),) in zip(ROWS, responses["writing"], strict=True):
        prompt = encode(row["question"])
        drawn = sample(
            model, prompt=[prompt], length=len(prompt) + 6, order="confidence", plan=loops, temperature=0.0,
            eos_token_id=ByteTokenizer().eos_token_id,
        )  # fmt: skip
        new = ByteTokenizer().decode(drawn.tokens[0, len(prompt) : int(drawn.lengths[0])])
        assert text == new.split("\n\n")[0]
    assert found["config"]["likelihood"]["method"] == options["method"]


@needs_harness
def test_greedy_is_what_is_written_from_left_to_right(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from loopmdm.harness import LoopMDMHarness

    harness = LoopMDMHarness(str(folder), samples=1, batch_size=2)
    prompt = encode("two")
    drawn = sample(harness.model, prompt=[prompt], length=8, order="left_to_right", temperature=0.0)
    tokens = drawn.tokens[0, 3:].tolist()
    other = [*tokens[:-1], (tokens[-1] + 1) % 200]
    (same, differs) = harness._loglikelihood_tokens(
        [(("", ""), prompt, tokens), (("", ""), prompt, other)], disable_tqdm=True
    )
    assert same[1] is True and differs[1] is False
    (empty,) = harness.loglikelihood([Instance("loglikelihood", {}, ("", "word"), 0)], disable_tqdm=True)
    bos = ByteTokenizer().bos_token_id
    assert empty[0] == pytest.approx(log_prob(harness.model, [bos], encode("word"), samples=1), rel=1e-5)
    (text,) = harness.generate_until(
        [Instance("generate_until", {}, ("two" * 20, {"until": "o", "max_gen_toks": 9}), 0)]
    )
    assert "o" not in text


@needs_harness
def test_a_task_says_how_texts_are_drawn(folder: Path) -> None:
    """Under the names that other models of the harness take; a repeated request is drawn anew."""
    from lm_eval.api.instance import Instance

    from loopmdm.harness import LoopMDMHarness

    harness = LoopMDMHarness(str(folder), seed=3)

    def texts(count: int, **options: Any) -> list[str]:
        written: list[str] = harness.generate_until(
            [Instance("generate_until", {}, ("two", options), 0)] * count, disable_tqdm=True
        )
        return written

    prompt, tokenizer = encode("two"), ByteTokenizer()

    def drawn(number: int, tokens: int, temperature: float) -> str:
        found = sample(
            harness.model, prompt=[prompt], length=3 + tokens, order="confidence", plan=2, seed=3,
            temperature=temperature, sequence_ids=[number], eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return tokenizer.decode(found.tokens[0, 3 : int(found.lengths[0])])

    assert texts(1) == [drawn(0, LENGTH // 2, 0.0)]
    assert texts(2, max_new_tokens=5) == [drawn(0, 5, 0.0)] * 2
    assert texts(3, max_gen_toks=7, temperature=0.8) == [drawn(number, 7, 0.8) for number in range(3)]
    assert texts(1, max_tokens=7, do_sample=True) == [drawn(0, 7, 1.0)]
    assert texts(1, max_tokens=7, do_sample=False, temperature=0.8) == [drawn(0, 7, 0.0)]
    with pytest.raises(ValueError, match="max_gen_toks: got 24, expected less than max_length = 24"):
        texts(1, max_gen_toks=24)


@needs_harness
def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    from loopmdm.harness import LoopMDMHarness

    with pytest.raises(ValueError, match="unknown method"):
        LoopMDMHarness(str(folder), method="exact")
    for options in ({"decoding": "confidnce"}, {"plan": "L3"}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"unknown order 'confidnce'|light is not given|steps"):
            LoopMDMHarness(str(folder), **options)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        LoopMDMHarness(str(folder), max_length=0)
    LoopMDM.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer in"):
        LoopMDMHarness(str(tmp_path / "bare"))


@needs_harness
def test_the_command_runs_a_task(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = (
        f"--model loopmdm --model_args pretrained={folder},samples=2 --tasks choice --include_path {folder}"
    )
    before = sys.argv
    # lm_eval asks for cuda:0 where no device is named.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["lm-eval", "run", *words.split(), "--output_path", str(tmp_path)]) == 0
    assert sys.argv is before
    (written,) = tmp_path.rglob("results*.json")
    assert 0 <= json.loads(written.read_text())["results"]["choice"]["acc,none"] <= 1


@needs_harness
def test_unknown_arguments_are_named(folder: Path) -> None:
    from loopmdm.harness import DuoHarness, LoopMDMHarness

    with pytest.raises(
        ValueError, match=r"--model_args: num_loop is not known.*num_loops.*accepted: pretrained"
    ):
        LoopMDMHarness(str(folder), num_loop=2)
    with pytest.raises(ValueError, match=r"--model_args: foo is not known; accepted: checkpoint_path"):
        DuoHarness(str(folder), foo=2)


def test_without_the_package_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "ls", "tasks"]) == 1
    assert "lm-eval needs the package lm_eval: pip install lm_eval" in capfd.readouterr().err
