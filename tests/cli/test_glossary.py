"""Every term that a command prints is in docs/glossary.md, which every --help names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from loopmdm import ComputePlan
from loopmdm.cli import COMMANDS, family, samples_table
from loopmdm.cli.study import STUDIES
from loopmdm.exits.rules import RULES
from loopmdm.model import flops
from loopmdm.runs import boards, likelihood
from loopmdm.sampling import ORDERS
from loopmdm.sampling.orders import COUNTS
from loopmdm.view.painters import legend

from .conftest import Call

TEXT = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = [row for row in re.findall(r"^\| (.+?) \| (.+) \|$", TEXT, flags=re.MULTILINE) if row[0] != "word"]
ENTRIES = [word for words, _ in ROWS for word in words.split(" or ")]
WORDS = set(re.findall(r"[\w⟨⟩·±/.+-]+", " ".join(ENTRIES)))
KNOWN = WORDS | set(re.findall(r"\w+", " ".join(meaning for _, meaning in ROWS)))
# Words of computing at large.
PLAIN = {"JSON", "CSV", "HTML", "PNG", "CUDA", "GPU", "GPUs", "CPU", "PyTorch", "NVIDIA", "MB"}


def abbreviations(text: str) -> set[str]:
    """Words with two capitals, or of a form such as S_max, that are no variables of the environment."""
    word = r"[A-Z]_[a-z]+|[A-Za-z]*[A-Z][A-Za-z]*[A-Z][A-Za-z]*"
    return set(re.findall(rf"(?<![\w./<-])(?:{word})(?![\w(/-]|\.\w)", text))


def test_each_word_has_one_meaning() -> None:
    assert len(ENTRIES) == len(set(ENTRIES)) and len(ROWS) > 60
    assert all(meaning for _, meaning in ROWS)


@pytest.mark.parametrize(
    "columns",
    [
        boards.SHARE_COLUMNS,
        likelihood.columns([{"mean_loops": 1.0}]),
        samples_table.COLUMNS,
        family.COLUMNS,
        ("spread", "ratio", "GFLOP/s", "of peak"),
        flops.CONVENTIONS,
    ],
    ids=lambda columns: columns[0],
)
def test_columns(columns: tuple[str, ...]) -> None:
    ordinary = {
        "text",
        "seconds",
        "model",
        "layers",
        "seed",
        "parameters",
        "more than heavy",
        "± s.e. (paired)",
    }
    assert set(columns) - ordinary <= {*ENTRIES, "NLL/token"}


def test_orders_rules_counts_and_the_legend() -> None:
    assert set(ORDERS) | set(COUNTS) <= {*KNOWN, "llada"}
    assert set(RULES) <= KNOWN
    assert set(re.findall(r"[a-z]+", legend().plain)) <= KNOWN


def test_plans_are_written_in_words_of_the_glossary() -> None:
    plans = [
        ComputePlan.adaptive(0.1, 12, 2),
        ComputePlan.adaptive(0.1, criterion="output"),
        ComputePlan.adaptive(criterion="argmax"),
        ComputePlan.parse("L1,H2", light=1, heavy=2),
        ComputePlan.by_mask_ratio([1, 2]),
    ]
    for plan in plans:
        words = set(re.findall(r"[A-Za-z_]{2,}", str(plan)))
        assert words <= KNOWN, plan


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for name in COMMANDS:
        parser = argparse.ArgumentParser(f"loopmdm {name}")
        import_module(f"loopmdm.cli.{name.replace('-', '_')}").add_arguments(parser)
        yield name, parser


def placeholders(parser: argparse.ArgumentParser) -> set[str]:
    """What stands for a value in --help: no term but the option's own."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(re.findall(r"\w+", f"{action.metavar or ''} {action.dest.upper()}"))
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= placeholders(inner)
    return found


VALUES = set().union(*(placeholders(parser) for _, parser in parsers()))


@pytest.mark.parametrize("words", [*([name] for name in COMMANDS), *(["study", name] for name in STUDIES)])
def test_help_names_the_glossary_and_uses_its_words(call: Call, words: list[str]) -> None:
    done = call(*words, "--help")
    assert "docs/glossary.md" in done.out
    unknown = abbreviations(done.out) - KNOWN - VALUES - PLAIN - {"LO", "HI", "VOCAB", "README"}
    explained = {word for word in unknown if re.search(rf"\b{word}\b,? (is|are|the)\b", done.out)}
    assert not unknown - explained


def test_the_top_help_names_it(call: Call) -> None:
    out = call("--help").out
    assert "docs/glossary.md" in out
    folder = Path(out.splitlines()[-1].removeprefix("docs/ is "))
    assert (folder / "glossary.md").is_file() and (folder / "inputs.md").is_file()


def test_what_commands_print_is_in_the_glossary(
    call: Call, text_run: Path, sudoku_run: Path, tmp_path: Path
) -> None:
    """Standard output and standard error of small runs of everything that prints figures."""
    board = "53...." + "." * 30
    runs = [
        ["sample", text_run, "--num", 1, "--length", 6, "--watch", "--html", tmp_path / "a.html"],
        ["sample", sudoku_run, "--num", 1, "--adaptive", "0.1"],
        ["eval", text_run, "--num-t", 1, "--windows", 2, "--adaptive", "0.1"],
        ["eval", text_run, "--samples", 2, "--steps", 2, "--length", 6],
        ["eval", sudoku_run, "--num", 2, "--num-t", 1],
        ["solve", board, "--model", sudoku_run, "--loops", "1,99", "--watch"],
        ["doctor"],
    ]
    for words in runs:
        done = call(*words)
        assert done.status == 0, done.err
        # Not boards, paths, and the names of the machine's parts.
        names = r"^(---|\||system |processor |nvcc |gpus ).*$|/\S+"
        printed = re.sub(names, "", done.out + done.err, flags=re.MULTILINE)
        if words[0] == "sample" and words[1] == text_run:
            printed = done.err.partition("wrote")[0].partition("step 1")[0]  # the model's own text is none
        assert abbreviations(printed) <= KNOWN | PLAIN, words
