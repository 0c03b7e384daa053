"""Ceilings measured on a GPU (`python -m bench.gpu_hopper`), in place of those the cost model assumes.

`measured.json` has an entry for each GPU by the name its driver gives: some of the fields of `CEILINGS`, and
the result file they are from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from loopmdm_kernels.files import write_files

FILE = Path(__file__).with_name("measured.json")
CEILINGS = (  # of `Device`
    "product_flops",
    "attention_flops",
    "l2_bytes",
    "sm_bytes",
    "wait_seconds",
    "load_seconds",
    "head_alone",
    "cluster_wait_seconds",
    "multicast_cost",
    "shared_read_bytes",
    "meet_seconds",
    "node_seconds",
)
Table = Mapping[str, Mapping[str, float]]


@cache
def table(path: Path = FILE) -> Table:
    """The ceilings by the name of the GPU; empty where there is no file.

    Raises:
        ValueError: an entry has an unknown field or one that is not a positive number.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    return {name: _checked(path, name, entry) for name, entry in json.loads(text).items()}


def record(name: str, ceilings: Mapping[str, float], source: str, path: Path = FILE) -> None:
    """Puts a GPU's entry in place of the one it had."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[name] = {**_checked(path, name, ceilings), "source": source}
    write_files({path: json.dumps(entries, indent=2, sort_keys=True) + "\n"})
    table.cache_clear()


def _checked(path: Path, name: str, entry: Mapping[str, Any]) -> dict[str, float]:
    found = {field: value for field, value in entry.items() if field != "source"}
    for field, value in found.items():
        if field not in CEILINGS:
            raise ValueError(f"{path}: {name}: got the field {field!r}, expected some of {CEILINGS}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{path}: {name}: {field}: got {value!r}, expected a positive number")
    return found
