"""The documents: their code runs, their commands are accepted, their links lead somewhere."""

import argparse
import pkgutil
import re
import shlex
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import draw_loop, results_page
from loopmdm import LoopMDM, LoopMDMConfig, sample
from tests import tutorials

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))
}
LINKS = [(name, link) for name, text in DOCUMENTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]


def blocks(language):
    """(document, content) of the code blocks in that language; test_tutorials.py has those of tutorials."""
    return [
        (name, content)
        for name, text in DOCUMENTS.items()
        if not name.startswith("docs/tutorials/")
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


EXAMPLES = [
    (name, step)
    for name, text in DOCUMENTS.items()
    if not name.startswith("docs/tutorials/")
    for step in tutorials.steps(text)
    if step.language == "python"
]


@pytest.mark.parametrize(("name", "step"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_code_runs(name, step, names, capsys, tmp_path, monkeypatch):
    """And prints what the block of `text` behind it shows."""
    monkeypatch.chdir(tmp_path)
    exec(compile(step.code, name, "exec"), names)
    printed = capsys.readouterr().out
    if name == "README.md":
        assert f"# {printed}" in step.code
    if step.shown:
        assert tutorials.agree(step.shown, printed)


def test_there_is_what_is_looked_for():
    assert sum(name == "README.md" for name, _ in COMMANDS) >= 6
    assert {"README.md", "docs/studies/scaling/README.md"} <= {name for name, _ in COMMANDS}
    assert len(LINKS) > 20


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_are_accepted(name, line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"loopmdm.cli.{command.replace('-', '_')}").add_arguments(parser)
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


def prose(name):
    """What is read: no code blocks, no targets of links."""
    text = re.sub(r"^```.*?^```", "", DOCUMENTS[name], flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)\s]+\)", "]", text)


FOLDERS = "docs|bench|tests|csrc|python|loopmdm_kernels|examples"
SOURCES = r"py|pyi|cpp|h|inl|cu|cuh|js|css|html|md"
TRACKED = [
    f"/{path.relative_to(ROOT).as_posix()}"
    for folder in FOLDERS.split("|")
    for path in sorted((ROOT / folder).rglob("*"))
]
TRACKED += [f"/{name}" for name in (*DOCUMENTS, "Makefile", "CMakeLists.txt", "setup.py", "conftest.py")]
# Files of other projects, whose samplers docs/laws.md compares with.
ELSEWHERE = {
    "generate.py", "generation_utils.py", "trainer_base.py", "dream/model/generation_utils_block.py",
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    """Paths from the root in the prose; in backquotes also ends of paths, and tests in them."""
    for path in re.findall(rf"(?<![\w/.`-])`?((?:{FOLDERS})/[\w./-]*[\w/])", prose(name)):
        assert (ROOT / path).exists(), f"{name}: no {path}"
    for path, test in re.findall(rf"`([\w./-]+\.(?:{SOURCES}))(?:::(\w+))?`", prose(name)):
        if path not in ELSEWHERE:
            found = [known for known in TRACKED if known.endswith(f"/{path}")]
            assert found, f"{name}: no {path}"
            assert not test or any(
                f"def {test}(" in (ROOT / known[1:]).read_text(encoding="utf-8") for known in found
            ), f"{name}: no test {test} in {path}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_of_python_exist(name):
    for dotted in re.findall(r"`(loopmdm(?:_kernels)?(?:\.\w+)+)", prose(name)):
        pkgutil.resolve_name(dotted)
    for module in re.findall(r"python -m ((?:bench|tests|loopmdm|loopmdm_kernels)[\w.]*)", DOCUMENTS[name]):
        assert find_spec(module), f"{name}: no module {module}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_targets_and_variables_exist(name):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", prose(name))) <= set(targets)
    assert set(re.findall(r"\bLOOPMDM_\w+\b", DOCUMENTS[name])) <= VARIABLES


VARIABLES = {
    variable
    for path in (ROOT / "setup.py", *ROOT.glob("loopmdm_kernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"))
    for variable in re.findall(r"\bLOOPMDM_\w+\b", path.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_that_are_named_exist(name):
    """Of commands within a sentence, which need not be complete."""
    for command in re.findall(r"`loopmdm (\w[^`]*)`", " ".join(prose(name).split())):
        word, *rest = command.split()
        if word != "COMMAND":
            known = options_of(word)
            assert {option for option in rest if option.startswith("--")} <= known, f"{name}: {command}"


@cache
def options_of(command):
    parser = argparse.ArgumentParser()
    import_module(f"loopmdm.cli.{command.replace('-', '_')}").add_arguments(parser)
    found, waiting = {"--help"}, [parser]
    while waiting:
        for action in waiting.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return found


def test_the_tree_of_the_front_page():
    (tree,) = [content for name, content in blocks("") if name == "README.md" and "csrc/cpu/" in content]
    folders = [line.split()[0] for line in tree.splitlines()]
    assert len(folders) == 8 and all((ROOT / folder).is_dir() for folder in folders)


def test_each_figure_is_shown_and_each_table_stands_once():
    shown = {((ROOT / name).parent / link).resolve() for name, link in LINKS if "://" not in link}
    figures = {*ROOT.glob("docs/**/*.png"), *ROOT.glob("docs/**/*.svg")}
    assert figures and figures <= shown
    assert not list(ROOT.glob("docs/**/*.csv"))


def test_each_feature_of_this_package_names_a_test():
    """Whether it exists is asked by test_files_that_are_named_exist."""
    rows = re.findall(r"^\| ([^|]+) \| ([YP–]).* \| ([^|]*) \|$", DOCUMENTS["docs/features.md"], re.MULTILINE)
    assert len(rows) == 52
    for feature, has, tested in rows:
        named = re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`|`make test`", tested)
        assert (named is None) is (has == "–"), f"{feature}: {tested}"


def test_each_decision_has_a_title_and_a_date():
    lines = re.findall(r"^- .*", DOCUMENTS["docs/decisions.md"], re.MULTILINE)
    assert len(lines) > 100
    for line in lines:
        assert re.match(r"- \*\*.+\*\* \(20\d\d-\d\d-\d\d\)\. \S", line), line


def test_the_front_page_is_short():
    """Sentences of 20 words in the mean, and at most 4 numbers in a hundred words."""
    assert DOCUMENTS["README.md"].count("\n") <= 130
    read = re.sub(r"^([|#!].*|```)$", "", prose("README.md"), flags=re.MULTILINE)
    parts = [part for part in re.split(r"\n\s*\n|\n(?=- )|[.!?]\s", read) if part.strip()]
    words = len(re.findall(r"[\w/.'-]+", read))
    assert words / len(parts) < 20
    assert len(re.findall(r"(?<![\w.`-])\d[\d.,]*", read)) / words <= 0.04


def test_figures_are_those_of_the_result_files():
    assert DOCUMENTS["docs/results.md"] == results_page.page()
    assert results_page.front_table() in DOCUMENTS["README.md"]
    assert (ROOT / "docs/loop.svg").read_text(encoding="utf-8") == draw_loop.draw()
