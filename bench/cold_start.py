"""How long imports take: wall-clock seconds, in processes that take turns.

python -m bench.cold_start
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import torch

ROUNDS = 5
STATEMENTS = ("import torch", "import loopmdm_kernels", "from loopmdm import LoopMDM, sample")
CODE = """
import sys, time
start = time.perf_counter()
exec(sys.argv[1])
print(time.perf_counter() - start)
"""


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", CODE, statement]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    took: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for number in range(ROUNDS + 1):
        for statement in STATEMENTS:
            found = seconds(statement)
            if number:  # the first reads the files from disk
                took[statement].append(found)
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    print(f"{versions}, medians of {ROUNDS}; files are in memory")
    for statement, values in took.items():
        print(f"{statement:34}  {statistics.median(values):.2f} s, at most {max(values):.2f} s")


if __name__ == "__main__":
    main()
