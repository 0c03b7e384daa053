"""A rank that is killed under torchrun: the run ends with one error, and goes on to the same bits."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.kills import campaign


def test_a_killed_rank_ends_the_run_which_then_resumes_bitwise(tmp_path: Path) -> None:
    result = campaign(tmp_path, kills=1, ranks=2, form="ddp", steps=30, longest=0.5, seed=0)
    (life,) = result["lives"]
    assert not life["early"] and life["equal"] and life["steps"] < 30
    assert len(life["errors"]) == 1 and "another process of this run has ended" in life["errors"][0]
    assert result["runs_bitwise"] == len(result["runs"]) == 1
