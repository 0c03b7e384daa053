"""Losses against FLOPs: means of windows of records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.training_curves import curve


def test_points_are_means_of_windows(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records = [{"step": n, "loss": float(n % 2), "flops": 10.0 * n} for n in range(1, 41)]
    records.insert(7, {"step": 7, "evaluation": {}})
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    flops, losses = curve(metrics)
    assert flops == [20.0 * n for n in range(1, 21)] and losses == [0.5] * 20
    metrics.write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(ValueError, match="has 1 records of losses; expected at least 20"):
        curve(metrics)
