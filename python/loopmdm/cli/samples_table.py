"""The figures of samples as `loopmdm eval --samples` prints them: a table, and what it depends on."""

from __future__ import annotations

from typing import Any

from loopmdm.model.flops import DEFAULT_CONVENTION
from loopmdm.quality.cost import cost_line

COLUMNS = (
    *("text", "gen. PPL", "bits/byte", "entropy, nats", "distinct-2", "distinct-3", "self-BLEU"),
    *("MAUVE", "calls/sample", "loops/call", "GFLOP/sample"),
)
_FIGURES = (
    "generative_perplexity",
    "bits_per_byte",
    "unigram_entropy",
    "distinct_2",
    "distinct_3",
    "self_bleu",
)


def columns(document: dict[str, Any]) -> tuple[str, ...]:
    """Those of `COLUMNS` that have figures."""
    has = any("mauve" in row for row in document["rows"])
    return tuple(name for name in COLUMNS if name != "MAUVE" or has)


def table(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of `columns`."""
    rows = []
    with_mauve = "MAUVE" in columns(document)
    for row in document["rows"]:
        cells = [row["text"], *(_figure(row.get(name)) for name in _FIGURES)]
        if with_mauve:
            cells.append(f"{row['mauve']['value']:.3g}" if "mauve" in row else "-")
        executed = row.get("executed")
        if executed is None:
            rows.append((*cells, "-", "-", "-"))
            continue
        flops = executed["flops"][DEFAULT_CONVENTION] / document["samples"]["num"]
        calls = row["network_calls_per_sample"]
        rows.append((*cells, f"{calls:.1f}", f"{executed['mean_loops']:.2f}", f"{flops / 1e9:.4g}"))
    return rows


def describe(document: dict[str, Any]) -> str:
    """What the figures of `table` depend on, in words."""
    about, rows = document["samples"], document["rows"]
    bootstrap = rows[0]["bootstrap"]
    again = (
        " They were texts, so that the entropy is that of the texts' tokens." if about.get("encoded") else ""
    )
    lines = [f"{about['num']} samples of {about['length']} tokens, read from {about.get('file')}.{again}"]
    if "file" not in about:
        steps = sorted({row["steps"] for row in rows if "steps" in row})
        shared = ("order", "temperature", "steps")
        others = "".join(
            f", {name} {value}" for name, value in about["options"].items() if name not in shared
        )
        lines = [
            f"{about['num']} samples of {about['length']} tokens, {about['order']} order,"
            f" T = {', '.join(map(str, steps))}, seed {about['seed']},"
            f" temperature {about['temperature']:g}{others}.",
            f"Network in {about['precision']['network']}; draws {about['precision']['race']}.",
        ]
    lines += [
        f"Scorer: {about['scorer'] or 'none'}. ± is the standard error of {bootstrap['resamples']} bootstrap"
        " resamples of the samples.",
        f"FLOPs are those executed, convention {about['flop_convention']}.",
    ]
    for row in rows:
        if "mauve" in row:
            found = row["mauve"]
            lines.append(
                f"MAUVE of {found['samples']} samples beside {found['human']} held-out texts, features of"
                f" {found['featurizer']}, {found['max_text_length']} tokens at most, {found['buckets']}"
                f" buckets, seed {found['seed']}."
            )
            break
    for row in rows:
        if "duo" in row:
            lines.append(f"{row['text']}, as Duo has them: {_pair(row['duo'])}{_stated(row)}.")
    return "\n".join([*lines, *(cost_line(row["cost"]) for row in rows if "cost" in row)])


def _stated(row: dict[str, Any]) -> str:
    return f"; the file says {_pair(row['stated'])}" if "stated" in row else ""


def _pair(figures: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} {'-' if value is None else format(value, '.5g')}" for name, value in figures.items()
    )


def _figure(estimate: dict[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.4g} ± {estimate['stderr']:.2g}"
