"""Foreign text in messages: visible, on one line, of bounded length."""

from __future__ import annotations

import pytest

from loopmdm.cli import main
from loopmdm.printable import printable, printable_lines


def test_what_a_terminal_acts_on_is_made_visible() -> None:
    assert printable("a\x1b[2J\r\nb\u202ec\x9b\ud800") == r"a\x1b[2J\r\nb\u202ec\x9b\ud800"
    assert printable("plain ünïcode 文") == "plain ünïcode 文"
    assert printable("x" * 500, longest=10) == "x" * 10 + "..."
    assert printable_lines("one\ntwo\x07\n") == "one\ntwo\\x07\n"


def test_the_command_line_prints_no_escape_of_a_path(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "\x1b]0;title\x07\x1b[2J/none.ckpt", "target"]) == 1
    error = capfd.readouterr().err
    assert "\x1b" not in error and "\x07" not in error and "none.ckpt" in error
