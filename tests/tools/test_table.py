"""docs/tools.md: each row names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_row_has_its_test():
    lines = (ROOT / "docs/tools.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) > 10
    for row in rows:
        _, tool, works, how, test, _ = re.split(r"(?<!\\)\|", row)
        assert tool.strip() and works.strip() and how.strip()
        named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", test)
        assert named, row
        for file, function in named:
            assert re.search(
                rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
            ), row
