"""Held-out likelihood as commands print it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopmdm.quality.likelihood import NLLResult

COLUMNS = ("loops S", "NLL/token", "± s.e.", "PPL", "± s.e.", "bits/byte", "± s.e.")


def to_dict(result: NLLResult) -> dict[str, Any]:
    """The result with the standard errors of all its figures, to first order in that of the NLL."""
    document = result.to_dict()
    document["perplexity_stderr"] = result.perplexity * result.stderr
    document["bits_per_byte_stderr"] = (
        None if result.bits_per_byte is None else result.bits_per_byte * result.stderr / result.nll
    )
    return document


def columns(results: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """`COLUMNS`, and how many loops an exit rule ran where there was one."""
    adaptive = any(result.get("mean_loops") is not None for result in results)
    return (*COLUMNS, "mean loops") if adaptive else COLUMNS


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of `columns` from what `to_dict` returned."""
    names = ["nll", "stderr", "perplexity", "perplexity_stderr", "bits_per_byte", "bits_per_byte_stderr"]
    names += ["mean_loops"] if len(columns(results)) > len(COLUMNS) else []
    return [(str(result["num_loops"]), *(_figure(result[name]) for name in names)) for result in results]


def _figure(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"
