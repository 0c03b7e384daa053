"""Where a block's time goes on a CPU: from a naive product to the present one, then the pieces of a block.

python -m bench.probes.cpu_ladder --output bench/results/DATE-cpu-ladder.json

See `bench.probes.ladder`. The steps are in cpu_ladder.cpp.
"""

from __future__ import annotations

from pathlib import Path

from bench.probes.ladder import climb

CASES = {  # D, H, L, rows that a thread carries through a block
    "D 768, 1024 tokens": (768, 12, 1024, 90),
    "D 768, 128 tokens": (768, 12, 128, 64),
    "D 256, 81 tokens on two threads": (256, 4, 81, 42),
    "D 256, 81 tokens": (256, 4, 81, 81),
}

if __name__ == "__main__":
    climb(__doc__, Path(__file__).with_suffix(".cpp"), CASES, whole="block")
