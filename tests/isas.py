"""Runs the tests once for each kind of processor that this machine can play.

    python tests/isas.py [--write FILE] [--only MODE ...] [tests ...]

The modes, each with the folders whose verdicts can depend on it:

- AVX2 in all libraries at once: whatever computes with floating-point numbers;
- OpenBLAS as on other processors: what multiplies with numpy, such as interpreted Triton kernels;
- each other instruction set of the CPU kernels below what sits on them; without vectors, which takes many
  times as long, below the ops and MDLM's model alone. tests/cpu and the folder of an op run over instruction
  sets by themselves, AVX2 has the first mode, and the best one is what `make test` uses.

Left out are tests that cannot depend on it: data and schedule compute with integers or in
Python, gpu_free and cuda compile or emulate device code, csrc and build test sources with flags of their own,
view, bench, files, fuzz, formats and cli have text, files and processes as results, and what stands beside
the folders looks at documents.

A mode has a cache of its own for torch.compile: its code is kept by source, and code for AVX-512 that is
found again where torch works with AVX2 ends in NaN or in a crash.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from loopmdm_kernels import _C

ROOT = Path(__file__).resolve().parents[1]
OPS = ["attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows"]
ON_KERNELS = ["ops", "mdlm", "model", "sampling", "study", "train", "quality", "tools"]
WITHOUT_VECTORS = ["ops", "mdlm"]
WITH_NUMPY = [*OPS, "triton", "model", "study", "train"]
BY_NUMPY = "triton or model or study or train"  # of the tests of an op, those of interpreted kernels
ALL = ["cpu", *OPS, "triton", *ON_KERNELS]
VARIABLES = (
    "LOOPMDM_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_CORETYPE",
)
AVX2 = dict(zip(VARIABLES, ("avx2", "avx2", "AVX2", "AVX2"), strict=False))


class Mode(NamedTuple):
    variables: dict[str, str]  # beside which none of VARIABLES is set
    folders: list[str]
    only: str = ""  # what pytest's -k takes


def modes() -> dict[str, Mode]:
    isas = _C.usable_cpu_isas().split(", ")
    found = {"avx2 everywhere": Mode(AVX2, ALL)} if "avx2" in isas else {}
    for core in ("Haswell", "Zen", *(["SkylakeX"] if "avx512" in isas else [])):
        found[f"OPENBLAS_CORETYPE={core}"] = Mode({"OPENBLAS_CORETYPE": core}, WITH_NUMPY, BY_NUMPY)
    for isa in isas:
        if isa not in ("avx2", _C.cpu_isa()):
            folders = WITHOUT_VECTORS if isa == "generic" else ON_KERNELS
            found[f"LOOPMDM_CPU_ISA={isa}"] = Mode({"LOOPMDM_CPU_ISA": isa}, folders)
    return found


def run(name: str, mode: Mode, tests: list[str], jobs: int) -> tuple[bool, str]:
    """Whether all passed, and the line that says so."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    parallel = ["-n", str(jobs)] if jobs > 1 else []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--no-header", *parallel, *tests]
            + (["-k", mode.only] if mode.only else []),
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache} | mode.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    counts = {word: 0 for word in ("passed", "failed", "skipped", "error")}
    summary = (done.stdout.strip().splitlines() or [""])[-1]
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary):
        counts[word] = int(number)
    failed = counts["failed"] + counts["error"]
    said = f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped"
    names = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    status = f"{name:<29} {said}, {time.monotonic() - start:.0f} s"
    if done.returncode != 0 and not failed:
        status += f"; pytest ended with {done.returncode}: {summary}"
    return done.returncode == 0, "\n".join([status, *names])


def heading() -> str:
    """What the verdicts are of."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return f"{time.strftime('%Y-%m-%d')}, commit {commit or '?'}, a machine with {_C.usable_cpu_isas()}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="instead of a mode's folders")
    parser.add_argument("--only", nargs="+", choices=modes(), metavar="MODE", help=", ".join(modes()))
    parser.add_argument("--jobs", type=int, default=1, help="test processes of a mode")
    parser.add_argument("--write", type=Path, help="also write what is printed to this file")
    arguments = parser.parse_args()
    lines, good = [heading()], True
    print(lines[0], flush=True)
    for name, mode in modes().items():
        if arguments.only and name not in arguments.only:
            continue
        tests = arguments.tests or [f"tests/{folder}" for folder in mode.folders]
        passed, line = run(name, mode, tests, arguments.jobs)
        print(line, flush=True)
        good &= passed
        lines.append(line)
        if arguments.write:
            arguments.write.parent.mkdir(parents=True, exist_ok=True)
            arguments.write.write_text("\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
