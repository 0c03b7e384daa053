"""Trainings that are killed, or whose disk fails, at any moment; the cases are those of `tests.faults`."""

from __future__ import annotations

import sys
from collections import Counter

from tests.faults import disks, kills
from tests.fuzz.harness import main


def case(seed: int) -> Counter[str]:
    return (kills if seed % 2 else disks).case(seed)


if __name__ == "__main__":
    sys.exit(main("faults", case, __doc__))
