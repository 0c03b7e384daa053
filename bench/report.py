"""Reduce pytest-benchmark's JSON to a result file: machine, versions, date, command, figures.

python -m bench.report RAW.json RESULT.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk


def reduce(raw: dict[str, Any]) -> dict[str, Any]:
    cpu = raw["machine_info"].get("cpu", {})
    return {
        "date": raw["datetime"][:10],
        "commit": raw.get("commit_info", {}).get("id"),
        "command": "make bench",
        "machine": {
            "cpu": cpu.get("brand_raw", platform.processor()),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "loopmdm_kernels": lk.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "backends": lk.available_backends(),
        "figures": {entry["name"]: entry["extra_info"] for entry in raw["benchmarks"]},
    }


def main(source: str, target: str) -> None:
    result = reduce(json.loads(Path(source).read_text()))
    temporary = Path(target).with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(target)
    for name, figures in result["figures"].items():
        print(
            f"{name:44} {figures['milliseconds']['ours']:10.3f} ms  "
            f"{figures['speedup_over_best_peer']:6.2f}x over {figures['best_peer']:22} "
            f"{100 * figures['share_of_limit']:5.1f} % of the limit"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
