"""What is run in an environment, and what of it is kept."""

import json
from pathlib import Path

import pytest

from bench import environments, results_page


@pytest.mark.parametrize("text", [None, "", '{"benchmarks": []}'])
def test_a_case_that_is_not_for_this_processor_leaves_nothing(monkeypatch, tmp_path, text):
    raw = tmp_path / "raw.json"
    raw.write_text('{"benchmarks": ["of another case"]}')
    monkeypatch.setattr(environments, "run", lambda *_, **__: text is None or raw.write_text(text))
    assert environments.measured(tmp_path / "a/bin/python", "case", raw, []) == []


def test_a_case_runs_alone_with_this_tree_and_a_cache_of_its_own(monkeypatch, tmp_path):
    raw, commands = tmp_path / "raw.json", []

    def run(command, env):
        commands.append(command)
        assert env["PYTHONPATH"].split(":")[1] == str(environments.ROOT)
        assert Path(env["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "a/inductor"
        raw.write_text(json.dumps({"benchmarks": [1]}))

    monkeypatch.setattr(environments, "run", run)
    found = environments.measured(tmp_path / "a/bin/python", "case", raw, ["quietly", "-t"])
    assert found == [{"benchmarks": [1]}]
    assert commands[0][:3] == ["quietly", "-t", str(tmp_path / "a/bin/python")]


@pytest.mark.parametrize(
    ("peer", "program"),
    [
        ("compiled whole bf16", "PyTorch"),
        ("eager fp32", "PyTorch"),
        ("zentorch bf16", "zentorch"),
        ("linear_cross_entropy, auto bf16", "linear_cross_entropy, auto bf16"),
    ],
)
def test_the_page_takes_the_best_of_each_program(peer, program):
    assert results_page.program(peer) == program
