"""Times tile sizes of the Triton products on this GPU and writes a table of those that beat the defaults.

python -m bench.tune_triton TABLE.json              the products of a block of the small preset
LOOPMDM_TRITON_TILES=TABLE.json python ...          uses it
python -m bench.tune_triton TABLE.json --dry-run    tiny tensors on the CPU, interpreted
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report import write
from loopmdm_kernels.testing import interleaved_medians
from loopmdm_kernels.triton.config import Tiles, default_tiles, key
from loopmdm_kernels.triton.launch import processor
from loopmdm_kernels.triton.linear import linear, weight_gradient

CANDIDATES = [
    Tiles(m, n, k, warps, stages)
    for m, n, k, warps, stages in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4))
    if 4096 <= m * n // warps * 4 <= 32768
]
DRY_CANDIDATES = [Tiles(16, 16, 16, 1, 1)]
GAIN = 1.03  # a table entry is worth its line from here on


def problems(
    device: torch.device, *, dry: bool
) -> Iterator[tuple[str, tuple[int, int, int], Callable[[], Any]]]:
    """(kernel, shape, call) of the plain products at the shapes of a block."""
    hidden, tokens = (16, (8,)) if dry else (768, (128, 1024, 16384))
    for rows in tokens:
        for columns, depth in (
            (3 * hidden, hidden),
            (4 * hidden, hidden),
            (hidden, 4 * hidden),
            (hidden, hidden),
        ):
            a = torch.randn(rows, depth, device=device).bfloat16()
            weight = torch.randn(columns, depth, device=device).bfloat16()
            grad = torch.randn(rows, columns, device=device).bfloat16()
            out = torch.zeros(columns, depth, device=device)

            def product(a: Tensor = a, weight: Tensor = weight) -> Tensor:
                return linear(a, weight)

            def gradient(grad: Tensor = grad, a: Tensor = a, out: Tensor = out) -> None:
                weight_gradient(grad, a, out, accumulate=True)

            yield "linear", (rows, columns, depth), product
            yield "weight_gradient", (columns, depth, rows), gradient


def with_tiles(call: Callable[[], Any], name: str, tile: Tiles, folder: Path) -> Callable[[], Any]:
    path = folder / f"{abs(hash((name, tile)))}.json"
    path.write_text(json.dumps({name: tile}))

    def run() -> Any:
        os.environ["LOOPMDM_TRITON_TILES"] = str(path)
        try:
            return call()
        finally:
            del os.environ["LOOPMDM_TRITON_TILES"]

    return run


def fits(call: Callable[[], Any]) -> bool:
    """Whether the processor has the registers and the shared memory; compiles on the way."""
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources:
        return False
    return True


def tuned(device: torch.device, *, dry: bool) -> dict[str, Tiles]:
    here, table = processor(device), {}
    candidates = DRY_CANDIDATES if dry else CANDIDATES
    with tempfile.TemporaryDirectory() as folder:
        for kernel, shape, call in problems(device, dry=dry):
            name = key(kernel, shape, torch.bfloat16, here.arch)
            default = default_tiles(kernel, shape, torch.bfloat16, here)
            calls = {default: call}
            for tile in candidates:
                attempt = with_tiles(call, name, tile, Path(folder))
                if tile != default and fits(attempt):
                    calls[tile] = attempt
            names = {str(tuple(tile)): tile for tile in calls}
            medians = interleaved_medians(
                {label: calls[tile] for label, tile in names.items()},
                repeats=1 if dry else 15,
                warmup=0 if dry else 2,
            )
            best = min(medians, key=lambda label: medians[label])
            gain = medians[str(tuple(default))] / medians[best]
            print(f"{name}: {best}, {gain:.2f} times the speed of the default", flush=True)
            if gain >= GAIN:
                table[name] = names[best]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny tensors on the CPU, interpreted")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("bench.tune_triton: torch finds no GPU on this machine")
    if "LOOPMDM_TRITON_TILES" in os.environ:
        sys.exit("bench.tune_triton: LOOPMDM_TRITON_TILES is set; the defaults are what is compared with")
    table = tuned(torch.device("cpu" if args.dry_run else "cuda"), dry=args.dry_run)
    write(table, args.table)


if __name__ == "__main__":
    main()
