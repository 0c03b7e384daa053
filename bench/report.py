"""Reduce pytest-benchmark's JSON to a result file, and print what was reached beside what was to be reached.

python -m bench.report RAW.json RESULT.json [COMMAND]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.script import arguments
from bench.targets import Target, targets_of
from loopmdm_kernels.files import write_file

Figures = Mapping[str, Any]
LIMIT_UNITS = ("peak_bf16", "peak_fp32", "matmul_bf16", "matmul_fp32", "read_bandwidth")


def merged(raws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs on one machine as one: its limits are the highest that any of them measured."""
    limits = [raw["machine_info"]["limits"] for raw in raws]
    best = {name: max(of[name] for of in limits) for name in LIMIT_UNITS}
    machine_info = {**raws[-1]["machine_info"], "limits": {**limits[-1], **best}}
    benchmarks = [entry for raw in raws for entry in raw["benchmarks"]]
    return {**raws[-1], "machine_info": machine_info, "benchmarks": benchmarks}


def reduce(raw: Mapping[str, Any], command: str) -> dict[str, Any]:
    machine = raw["machine_info"]
    limits = machine["limits"]
    return {
        "date": raw["datetime"][:10],
        "commit": raw.get("commit_info", {}).get("id"),
        "command": command,
        "machine": {
            "cpu": machine.get("cpu", {}).get("brand_raw", machine.get("processor")),
            "cores": machine["cores"],
            "threads": limits["threads"],
            "cpu_isa": limits["isa"],
            "processor_isa": limits["processor_isa"],
            "limiting_variables": limits["limiting_variables"],
            "gpu": machine["gpu"],
            "giga_per_second": {name: round(limits[name] / 1e9, 1) for name in LIMIT_UNITS},
        },
        "versions": machine["versions"],
        "backends": machine["backends"],
        "figures": {entry["name"]: with_share(entry["extra_info"], limits) for entry in raw["benchmarks"]},
    }


def with_share(figures: Figures, limits: Mapping[str, Any]) -> dict[str, Any]:
    """And the share of the peak of the whole run, which is known at its end; where anything is computed."""
    if "gflops" not in figures:
        return dict(figures)
    peak = limits[f"peak_{figures['dtype']}"]
    return {**figures, "share_of_peak": round(1e9 * figures["gflops"] / peak, 3)}


def verdict(figures: Figures, target: Target | None) -> str:
    """What is missing, in percent of the demand; "met", or "reached" where more was hoped for; else empty."""
    if target is None:
        return ""
    missed = []
    if figures["speedup"] < target.speedup:
        missed.append(f"speed-up by {_percent(1 - figures['speedup'] / target.speedup)}")
    if target.share_of_peak is not None and figures["share_of_peak"] < target.share_of_peak:
        missed.append(f"share by {_percent(1 - figures['share_of_peak'] / target.share_of_peak)}")
    bf16 = figures.get("speedup_with_bf16_parameters", target.speedup)
    if bf16 < target.speedup:
        missed.append(f"with bf16 parameters by {_percent(1 - bf16 / target.speedup)}")
    if target.memory is not None and "memory" not in figures:
        missed.append("memory not measured")
    elif target.memory is not None and figures["memory"] > target.memory:
        missed.append(f"memory by {_percent(figures['memory'] / target.memory - 1)}")
    if missed:
        return "missed: " + ", ".join(missed)
    beyond = target.reach is not None and figures["speedup"] >= target.reach
    if target.reach_share is not None and figures["share_of_peak"] < target.reach_share:
        beyond = False
    return "reached" if beyond else "met"


def processor(machine: Mapping[str, Any]) -> str:
    """The processor of a result file; and, where libraries were told to, as which other one it computed."""
    text = f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_isa']}"
    if limiting := machine.get("limiting_variables"):
        variables = " ".join(f"{name}={value}" for name, value in limiting.items())
        text += f" on a processor with {machine['processor_isa']} ({variables})"
    return text


def table(result: Mapping[str, Any], targets: Mapping[str, Target] | None = None) -> str:
    """One line a case: its time, the best peer's, and speed-up and share of the peak beside the targets.

    targets: None for those of the instruction set.
    """
    machine, versions = result["machine"], result["versions"]
    limit = machine["giga_per_second"]
    if targets is None:
        targets = targets_of(machine["cpu_isa"])
    lines = [
        f"{processor(machine)}; torch {versions['torch']}; {result['date']}",
        f"Peak of the instructions: bf16 {limit['peak_bf16']:.0f}, fp32 {limit['peak_fp32']:.0f} GFLOP/s "
        f"(torch's matmul: {limit['matmul_bf16']:.0f}, {limit['matmul_fp32']:.0f}); "
        f"memory is read at {limit['read_bandwidth']:.1f} GB/s",
        "",
        f"{'case':44} {'ms':>9}  {'best peer':18} {'ms':>9}  {'speed-up':8} {'of':>4}  "
        f"{'GFLOP/s':>7}  {'share':5} {'of':>4}  target",
    ]
    for name, figures in result["figures"].items():
        if "milliseconds" not in figures:  # something counted, not timed
            lines.append(
                f"{name.removeprefix('test_')}: " + ", ".join(f"{k} {v}" for k, v in figures.items())
            )
            continue
        target = targets.get(name)
        milliseconds = figures["milliseconds"]
        demanded = f"{target.speedup:.2f}".removesuffix("0") if target else ""
        share = _percent(target.share_of_peak) if target and target.share_of_peak else ""
        rate = f"{figures['gflops']:.0f}" if "gflops" in figures else ""
        reached = _percent(figures["share_of_peak"]) if "gflops" in figures else ""
        more = f" (memory {figures['memory']:.2f})" if "memory" in figures else ""
        if "speedup_with_bf16_parameters" in figures:
            more += f" (bf16 parameters {figures['speedup_with_bf16_parameters']:.2f})"
        lines.append(
            f"{name.removeprefix('test_'):44} {milliseconds['ours']:9.2f}  "
            f"{figures['best_peer']:18} {milliseconds[figures['best_peer']]:9.2f}  "
            f"{figures['speedup']:8.2f} {demanded:>4}  {rate:>7}  "
            f"{reached:>5} {share:>4}  {verdict(figures, target)}{more}".rstrip()
        )
    return "\n".join(lines)


def write(result: Mapping[str, Any], target: Path) -> None:
    write_file(target, json.dumps(result, indent=1) + "\n")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def main(source: str, target: str, command: str = "make bench") -> None:
    result = reduce(json.loads(Path(source).read_text()), command)
    write(result, Path(target))
    print(table(result))


if __name__ == "__main__":
    main(*arguments(__doc__, "raw", "result", "[command]"))
