"""The documents: their code runs, their commands are accepted, their links lead somewhere."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import draw_loop, results_page
from loopmdm import LoopMDM, LoopMDMConfig, sample

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))
}
LINKS = [(name, link) for name, text in DOCUMENTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]


def blocks(language):
    """(document, content) of the code blocks in that language."""
    return [
        (name, content)
        for name, text in DOCUMENTS.items()
        for found, content in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        if found == language
    ]


def lines_of_commands():
    """Commands of the blocks without a language; a line that ends with a backslash goes on."""
    for name, content in blocks(""):
        for line in content.replace("\\\n", " ").splitlines():
            if line.startswith("loopmdm ") and not line.startswith("loopmdm COMMAND"):
                yield name, line


COMMANDS = list(lines_of_commands())


@pytest.fixture
def names():
    """What an example of a part takes for granted."""
    model = LoopMDM(LoopMDMConfig.preset("sudoku6"))
    canvas = torch.full((2, 36), model.config.mask_token_id)
    return {"__name__": "example", "model": model, "canvas": canvas, "sample": sample}


@pytest.mark.parametrize(("name", "code"), blocks("python"), ids=[name for name, _ in blocks("python")])
def test_code_runs(name, code, names, capsys):
    exec(compile(code, name, "exec"), names)
    if name == "README.md":
        assert capsys.readouterr().out.startswith("torch.Size([4, 81]) tensor([72, 72, 72, 72])")


def test_there_is_what_is_looked_for():
    assert sum(name == "README.md" for name, _ in COMMANDS) >= 6
    assert {"README.md", "docs/studies/scaling/README.md"} <= {name for name, _ in COMMANDS}
    assert len(LINKS) > 20


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_are_accepted(name, line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"loopmdm.cli.{command}").add_arguments(parser)
    parser.parse_args(arguments)


def anchors(text):
    """The names that a browser gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("name", "link"), LINKS)
def test_links_lead_somewhere(name, link):
    if re.match(r"https?://", link):
        return
    file, _, anchor = link.partition("#")
    target = (ROOT / name).parent / file if file else ROOT / name
    assert target.exists(), f"{name}: no file {file}"
    assert not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    """Paths from the root, in backquotes."""
    for path in re.findall(
        r"`((?:docs|bench|tests|csrc|python|loopmdm_kernels|examples)/[\w./-]+)`", DOCUMENTS[name]
    ):
        assert (ROOT / path).exists(), f"{name}: no {path}"


def test_the_front_page_is_short():
    assert DOCUMENTS["README.md"].count("\n") <= 130


def test_figures_are_those_of_the_result_files():
    assert DOCUMENTS["docs/results.md"] == results_page.page()
    assert results_page.front_table() in DOCUMENTS["README.md"]
    assert (ROOT / "docs/loop.svg").read_text(encoding="utf-8") == draw_loop.draw()
