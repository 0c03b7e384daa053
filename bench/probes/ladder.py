"""Ladders of CPU kernels: programs that time a kernel's steps on one thread, compiled here and run.

One thread, medians of nine turns. A step's share is that of the peak of the instructions, measured in the
same run. A piece without products has none; its part of the whole says what it costs. LOOPMDM_CPU_ISA chooses
the instruction set. The flags are those of CMakeLists.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopmdm_kernels import _C
from loopmdm_kernels.files import write_file

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=gnu++20", "-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno")  # of a release


def flags_of(isa: str) -> list[str]:
    """What CMakeLists.txt compiles the kernels of an instruction set with."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = dict(re.findall(r"set\((\w+)_flags ([^)]*)\)", text))

    def expanded(name: str) -> list[str]:
        flags: list[str] = []
        for word in found.get(name, "").split():
            other = re.fullmatch(r"\$\{(\w+)_flags\}", word)
            flags += expanded(other[1]) if other else [word]
        return flags

    return expanded(isa)


def build(source: Path, isa: str, folder: Path) -> Path:
    program = folder / source.stem
    command = [os.environ.get("CXX", "c++"), *FLAGS, f"-DLOOPMDM_ISA={isa}", *flags_of(isa)]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    return program


def steps_of(
    program: Path, case: tuple[int, ...], dtype: str, seconds: float, whole: str
) -> list[dict[str, Any]]:
    """What a program prints of a case; `whole`: the step of which others, named after it, are pieces."""
    run = [str(program), dtype, *map(str, case), str(seconds)]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    fields = [line.split("\t") for line in lines]
    peak = next(float(flops) / float(time) for name, flops, time in fields if name == "peak")
    total = next(float(time) for name, _, time in fields if name == whole)
    steps = []
    for name, flops, time in fields:
        step: dict[str, Any] = {"step": name, "microseconds": round(1e6 * float(time), 3)}
        if float(flops):
            step["gflops"] = round(float(flops) / float(time) / 1e9, 2)
            step["share_of_peak"] = round(float(flops) / float(time) / peak, 3)
        if name.startswith(whole):
            step[f"part_of_{whole}"] = round(float(time) / total, 3)
        steps.append(step)
    return steps


def table(case: str, steps: list[dict[str, Any]], whole: str) -> str:
    def percent(step: dict[str, Any], key: str) -> str:
        return f"{100 * step[key]:.1f} %" if key in step else ""

    lines = [f"{case:52} {'us':>12} {'of peak':>9} {'of ' + whole:>9}"]
    for step in steps:
        share, part = percent(step, "share_of_peak"), percent(step, f"part_of_{whole}")
        lines.append(f"  {step['step']:50} {step['microseconds']:12.2f} {share:>9} {part:>9}")
    return "\n".join(lines)


def climb(description: str | None, source: Path, cases: Mapping[str, tuple[int, ...]], whole: str) -> None:
    """The command line of a ladder: `source` is its program, `cases` are the arguments of that."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", default="", help="cases whose names contain it")
    parser.add_argument("--seconds", type=float, default=0.01, help="of each step and turn")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    isa = _C.cpu_isa()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        program = build(source, isa, Path(folder))
        for name, case in cases.items():
            if args.only in name:
                results[name] = steps_of(program, case, args.dtype, args.seconds, whole)
                print(table(f"{name}, {args.dtype}, {isa}", results[name], whole), flush=True)
    if args.output:
        command = f"python -m bench.probes.{source.stem} " + " ".join(sys.argv[1:])
        report = {"command": command, "isa": isa, "dtype": args.dtype, "cases": results}
        write_file(args.output, json.dumps(report, indent=1) + "\n")
