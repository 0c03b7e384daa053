"""What is said about a run on standard error."""

from __future__ import annotations

from loopmdm.train.progress import clock, describe_evaluation


def test_an_evaluation_in_one_line() -> None:
    results = {
        "held_out": [{"num_loops": 1, "nll": 2.5}, {"num_loops": 4, "nll": 2.25}],
        "solved": [{"order": "confidence", "num_loops": 4, "share_solved": 0.125}],
        "other": [1],
    }
    assert describe_evaluation(30, results) == (
        'step 30  evaluation: S 1 NLL 2.5000, S 4 NLL 2.2500, S 4 confidence 12.5% solved, {"other": [1]}'
    )


def test_clock() -> None:
    assert clock(3661.4) == "1:01:01"
