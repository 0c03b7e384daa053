"""A fuzzer is a function of a seed that raises where something is wrong, and counts what it tried."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable

os.environ.setdefault("OMP_NUM_THREADS", "1")

Case = Callable[[int], "Counter[str]"]


class Wrong(AssertionError):
    """A result that is silently different, or a refusal of the wrong kind; the message holds the input."""


def reproduction(name: str, seed: int, package: str = "tests.fuzz") -> str:
    return f"python -m {package}.{name} --seed {seed}"


def first_seed(seed: int, worker: int) -> int:
    """Where a worker's seeds start: workers of one run share none, short of 2^32 cases each."""
    return (seed << 40) + (worker << 32)


def run_seeds(case: Case, seeds: Iterable[int]) -> Counter[str]:
    """All cases one after the other; the first that fails says how to repeat it."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            counts += case(seed)
        except Exception as error:
            name = case.__module__.rpartition(".")[2]
            raise Wrong(f"{reproduction(name, seed)}\n{type(error).__name__}: {error}") from error
    return counts


def main(name: str, case: Case, description: str | None, package: str = "tests.fuzz") -> int:
    """The command line of one fuzzer: repeats a case, or some from a seed on."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}.{name}", description=description)
    parser.add_argument("--seed", type=int, required=True, help="of the (first) case")
    parser.add_argument("--count", type=int, default=1, help="cases, of the seeds that follow each other")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    failed = 0
    for seed in range(args.seed, args.seed + args.count):
        try:
            counts += case(seed)
        except Exception:
            failed += 1
            print(reproduction(name, seed, package), file=sys.stderr)
            traceback.print_exc()
    print(f"{args.count} cases, {failed} failed; " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    return 1 if failed else 0
