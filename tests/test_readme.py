"""The README's example runs, and its commands are accepted."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^loopmdm (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_python_example(capsys):
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.startswith("torch.Size([4, 81]) tensor([72, 72, 72, 72])")


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith("COMMAND")])
def test_commands_are_accepted(line):
    name, *arguments = shlex.split(line)
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"loopmdm.cli.{name}").add_arguments(parser)
    parser.parse_args(arguments)
