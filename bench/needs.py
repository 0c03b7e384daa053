"""What `make gpu ENV=system` needs of the Python that is there: python -m bench.needs says what is missing.

Imports nothing but Python itself.
"""

from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

OLDEST = {"torch": (2, 10), "triton": (3, 6), "cuda-bindings": (12, 0), "pybind11": (3, 0)}
PACKAGES = (*OLDEST, "numpy", "einops", "safetensors", "rich", "pytest", "hypothesis", "setuptools")
PROGRAMS = ("cmake", "ninja")


def missing() -> list[str]:
    found = [f"Python 3.10 or later, got {sys.version.split()[0]}"] if sys.version_info < (3, 10) else []
    for name in PACKAGES:
        oldest = OLDEST.get(name, (0,))
        wanted = ".".join(map(str, oldest)) + " or later" if name in OLDEST else "any version"
        try:
            got = version(name)
        except PackageNotFoundError:
            found.append(f"{name}, {wanted}")
            continue
        numbers = tuple(int(number) for number in re.findall(r"\d+", got)[:2])
        if numbers < oldest:
            found.append(f"{name}, {wanted}, got {got}")
    return found + [f"the program {name}" for name in PROGRAMS if shutil.which(name) is None]


if __name__ == "__main__":
    if lacking := missing():
        sys.exit("\n  ".join([f"{sys.executable} lacks:", *lacking]))
