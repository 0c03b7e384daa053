"""Times the kernels beside what a user could install instead, each in a virtual environment of its own.

python -m bench.environments --results bench/results

Each of ENVIRONMENTS is made once, in --folder, and runs the same cases there with the kernels of this tree,
whose compiled module links no torch. A case is a process in which ours and the peers take turns. The result
file of an environment is RESULTS/DATE-cpu-NAME.json. On a machine with other work, --alone gives a command
that runs another one undisturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench import report

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("numpy", "safetensors", "einops", "rich", "pytest", "pytest-benchmark")


class Environment(NamedTuple):
    packages: tuple[str, ...]
    cases: str  # what pytest's -k takes


CASES = "(looped_blocks and D768) or test_model or test_training_step or test_masked_cross_entropy"
INFERENCE = "(looped_blocks and D768) or test_model"
ENVIRONMENTS = {
    "torch-2.13-openvino": Environment(("torch==2.13.0", "openvino==2026.4.1"), CASES),
    "torch-2.15": Environment(("torch==2.15.0",), CASES),
    "zentorch": Environment(("torch==2.13.0", "zentorch==2.13.0.2"), INFERENCE),
}


def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, check=True, text=True, **more)


def made(folder: Path, environment: Environment) -> Path:
    """The interpreter of the environment in `folder`, which is made where it is not there."""
    python, done = folder / "bin" / "python", folder / ".complete"
    if not done.exists():
        run([sys.executable, "-m", "venv", "--clear", str(folder)])
        run([str(python), "-m", "pip", "install", "-q", *environment.packages, *NEEDED])
        done.touch()
    return python


def cases(python: Path, chosen: str) -> list[str]:
    """Those that pytest would run, as it names them."""
    command = [str(python), "-m", "pytest", "bench", "--collect-only", "-q", "-k", chosen]
    listing = run(command, env=variables(python), stdout=subprocess.PIPE).stdout
    return [line for line in listing.splitlines() if "::" in line]


def variables(python: Path) -> dict[str, str]:
    """Of a process in an environment: this tree is what is imported, and compiled code is not shared."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(python.parents[1] / "inductor"),
    }


def measured(python: Path, case: str, raw: Path, alone: list[str]) -> list[dict[str, Any]]:
    """What pytest-benchmark writes of the case; nothing where the case is not for this processor."""
    command = [str(python), "-m", "pytest", case, "-q", "-p", "no:cacheprovider", f"--benchmark-json={raw}"]
    raw.unlink(missing_ok=True)
    run([*alone, *command], env=variables(python))
    content = json.loads(raw.read_text() or "{}") if raw.exists() else {}
    return [content] if content.get("benchmarks") else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=[*ENVIRONMENTS])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "environments")
    parser.add_argument("--results", type=Path, default=ROOT / "build")
    parser.add_argument(
        "--cases", metavar="TEXT", help="what pytest's -k takes, in place of an environment's own"
    )
    parser.add_argument("--alone", type=shlex.split, default=[], metavar="COMMAND")
    options = parser.parse_args()
    for name in options.only:
        environment = ENVIRONMENTS[name]
        python = made(options.folder / name, environment)
        raws: list[dict[str, Any]] = []
        for case in cases(python, options.cases or environment.cases):
            raws += measured(python, case, options.folder / "raw.json", options.alone)
            if raws:
                result = report.reduce(report.merged(raws), f"python -m bench.environments --only {name}")
                report.write(result, options.results / f"{time.strftime('%Y-%m-%d')}-cpu-{name}.json")
        print(report.table(result), flush=True)


if __name__ == "__main__":
    main()
