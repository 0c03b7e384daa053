"""The page of `loopmdm bench --html`: one file, charts as inline SVG, no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from loopmdm.view.charts import Point, Series, bars, chart, number

_HEAD = '<!doctype html>\n<html lang="en">\n<meta name="generator" content="loopmdm bench">\n'
_NAMES = {
    "reference": "PyTorch, eager",
    "eager": "PyTorch, eager",
    "compiled": "PyTorch, compiled",
    "eager fp32": "PyTorch, eager fp32",
}
_AXES = {"loops": "loops S", "length": "length", "batch": "batch"}


def is_page(path: Path) -> bool:
    """Whether a file begins as those of `page` do."""
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD.encode()


def page(document: Mapping[str, Any]) -> str:
    """The page of what `loopmdm bench --html --json` prints."""
    parts = [
        _facts(document),
        _speed(document),
        _roofline(document),
        _cost(document),
        _memory(document),
        _errors(document),
        _how(document),
    ]
    style = files("loopmdm.view").joinpath("charts.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in parts if part)
    return (
        f'{_HEAD}<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>loopmdm bench</title>\n<style>\n{style}</style>\n<h1>loopmdm bench</h1>\n{body}\n</html>\n"
    )


def _name(variant: str, figure: Mapping[str, Any] | None = None) -> str:
    if variant == "reference" and figure is not None and "eager" in figure["speedups"]:
        return "PyTorch, head in fp32"
    return _NAMES.get(variant, f"ours ({variant})")


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _machine(document: Mapping[str, Any]) -> str:
    about = document["provenance"]
    machine, versions = about["machine"], about["versions"]
    isa = machine["backends"].get("cpu")
    kind = f", {isa}" if document["device"] == "cpu" and isinstance(isa, str) else ""
    return (
        f"{machine['processor']}, {document['threads']} threads{kind}; loopmdm {versions['loopmdm']}, torch"
        f" {versions['torch']}, Python {versions['python']}; {about['date']}"
    )


def _facts(document: Mapping[str, Any]) -> str:
    about = document["provenance"]
    limits = [f"reading {document['read_gb_s']:.3g} GB/s"]
    if document["peak_gflops"] is not None:
        limits.insert(0, f"{document['peak_gflops']:.4g} GFLOP/s of instructions in {document['dtype']}")
    rows = {
        "command": f"<code>{_escape(about['command'])}</code>",
        "machine": _escape(_machine(document)),
        "device and kernels": f"{_escape(document['device'])}, backend {_escape(document['backend'])}",
        "limits, measured in the run": _escape("; ".join(limits)),
    }
    return (
        f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in rows.items())}</dl>"
    )


def _section(title: str, words: str, content: str, document: Mapping[str, Any]) -> str:
    source = f"{_machine(document)}; {document['provenance']['command']}"
    return (
        f"<section><h2>{_escape(title)}</h2><p>{_escape(words)}</p>{content}"
        f'<p class="source">{_escape(source)}</p></section>'
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _charts(*drawn: str) -> str:
    return f'<div class="charts">{"".join(f"<figure>{one}</figure>" for one in drawn)}</div>'


def _interval(values: Sequence[float], digits: int = 3) -> str:
    median, low, high = (f"{value:.{digits}g}" for value in values)
    return f"{median} [{low}, {high}]"


def _speed(document: Mapping[str, Any]) -> str:
    figures, backend = document["figures"], document["backend"]
    groups = [
        (name, [(_name(peer, one), Point(v[0], 0, *v[1:])) for peer, v in one["speedups"].items()])
        for name, one in figures.items()
    ]
    rows = [
        (
            name,
            one["shape"],
            _name(which, one),
            _interval(one["interval_ms"][which]),
            "" if which == backend else _interval(one["speedups"][which]),
            f"{one['gflops'][which]:.4g}",
        )
        for name, one in figures.items()
        for which in one["interval_ms"]
    ]
    columns = ("call", "shape", "by", "ms [interval]", "speed-up over it [interval]", "GFLOP/s")
    words = (
        "How many times as fast our kernels are as each way to compute the same in plain PyTorch, by the"
        " ratios of times in the same turns: medians, and intervals that hold the true median with at least"
        f" 95 % ({document['repeats']} turns; fewer than six give their range)."
    )
    missing = "".join(
        f"<p>{_escape(f'Compiled {name} was not timed: {why}')}</p>"
        for name, why in document["missing"].items()
    )
    content = _charts(bars(groups, x="times as fast", one=1.0, title="speed-ups")) + _table(columns, rows)
    return _section("Speed-ups", words, content + missing, document)


def _roofline(document: Mapping[str, Any]) -> str:
    figures, backend, peak = document["figures"], document["backend"], document["peak_gflops"]
    read = document["read_gb_s"]
    at = {name: one["flops"] / one["traffic"] for name, one in figures.items()}
    best = {
        name: max((rate, which) for which, rate in one["gflops"].items() if which != backend)
        for name, one in figures.items()
    }
    ours = {name: (one["gflops"][backend], backend) for name, one in figures.items()}
    lines = [
        Series(
            title,
            [
                Point(at[name], rate, label=f"{name}: {rate:.4g} GFLOP/s, {_name(which, figures[name])}")
                for name, (rate, which) in rates.items()
            ],
            line=False,
        )
        for title, rates in ((_name(backend), ours), ("the fastest PyTorch of each", best))
    ]
    low, high = min(at.values()) / 2, max(at.values()) * 2
    if peak is None:
        roof = [Point(x, x * read) for x in (low, high)]
    else:
        ridge = peak / read  # left of it memory is the limit, right of it the instructions
        low, high = min(low, ridge / 4), max(high, 2 * ridge)
        roof = [Point(low, low * read), Point(ridge, peak), Point(high, peak)]
    lines.append(Series("roof: instructions, and memory read once", roof, mark=False))
    drawn = chart(
        lines, x="FLOP for each byte that has to move", y="GFLOP/s", x_log=True, y_log=True, title="roofline"
    )
    rows = [
        (
            name,
            number(at[name]),
            f"{one['gflops'][backend]:.4g}",
            "-" if one["share_of_peak"] is None else f"{one['share_of_peak']:.0%}",
        )
        for name, one in figures.items()
    ]
    words = (
        "Operations of the mathematics a second, against how many there are for each byte that has to be"
        " read or written once. Weights are read once whatever S is, so a loop stands far to the right."
    )
    columns = ("call", "FLOP/byte", "GFLOP/s", "of peak")
    return _section("Roofline", words, _charts(drawn) + _table(columns, rows), document)


def _cost(document: Mapping[str, Any]) -> str:
    drawn, rows = [], []
    for name, one in document["series"].items():
        fixed = ", ".join(f"{'S' if key == 'loops' else key} {value}" for key, value in one["fixed"].items())
        lines = [
            Series(_name(which), [Point(x, *values) for x, values in zip(one["at"], points, strict=True)])
            for which, points in one["interval_ms"].items()
        ]
        axis = f"{_AXES[name]} ({fixed})"
        drawn.append(chart(lines, x=axis, y="ms", x_ticks=one["at"], title=f"cost against {_AXES[name]}"))
        for index, x in enumerate(one["at"]):
            cells = [_interval(points[index]) for points in one["interval_ms"].values()]
            rows.append((f"{_AXES[name]} {x}", fixed, *cells))
    columns = (
        "at",
        "fixed",
        *(f"{_name(which)}, ms" for which in document["series"]["loops"]["interval_ms"]),
    )
    return _section(
        "Cost against S, length and batch",
        "Times of looped_blocks, forward, two blocks: medians with intervals.",
        _charts(*drawn) + _table(columns, rows),
        document,
    )


def _memory(document: Mapping[str, Any]) -> str:
    found = document["memory"]
    if not found:
        return ""
    lines = [
        Series(_name(which), [Point(x, y) for x, y in zip(found["at"], values, strict=True)])
        for which, values in found["mib"].items()
    ]
    drawn = chart(lines, x="loops S", y="MiB", x_ticks=found["at"], title="memory against S")
    rows = [
        (str(x), *(f"{values[index]:.4g}" for values in found["mib"].values()))
        for index, x in enumerate(found["at"])
    ]
    columns = ("S", *(f"{_name(which)}, MiB" for which in found["mib"]))
    words = (
        "What a forward and a backward pass of looped_blocks take at most beyond weights and inputs: one call"
        " each, by the pages of the process on a CPU, by the allocator on a GPU. With recompute only the"
        " input of each loop is kept."
    )
    return _section("Memory against S", words, _charts(drawn) + _table(columns, rows), document)


def _errors(document: Mapping[str, Any]) -> str:
    found = document["errors"]
    lines = [
        Series(_name(which), [Point(x, y) for x, y in zip(found["at"], values, strict=True) if y > 0])
        for which, values in found["error"].items()
    ]
    steps = zip(found["at"], found["rounding_step"], strict=True)
    lines.append(Series("one rounding step", [Point(x, y) for x, y in steps if y > 0], mark=False))
    drawn = chart(
        [line for line in lines if line.points],
        x=f"loops S ({found['shape']})",
        y="largest error",
        x_ticks=found["at"],
        y_log=True,
        title="error against float64",
    )
    rows = [
        (str(x), *(f"{values[index]:.2e}" for values in found["error"].values()))
        for index, x in enumerate(found["at"])
    ]
    words = (
        f"Largest difference of looped_blocks in {document['dtype']} from the same in float64, ours and plain"
        " PyTorch's."
    )
    columns = ("S", *(_name(which) for which in found["error"]))
    return _section("Error against the oracle", words, _charts(drawn) + _table(columns, rows), document)


def _how(document: Mapping[str, Any]) -> str:
    about = document["provenance"]
    backends = "; ".join(f"{name}: {state}" for name, state in about["machine"]["backends"].items())
    return (
        "<section><h2>How</h2><p>Every figure on this page is of the one run above. Variants are timed in"
        " turns, so that a slow spell of the machine is in all of them. GFLOP/s count the mathematics: what"
        f" is computed twice counts once.</p><p>Backends here: {_escape(backends)}.</p></section>"
    )
