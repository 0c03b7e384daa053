"""Where the time of `masked_cross_entropy` goes on a CPU: from three loops to the present kernel; its pieces.

python -m bench.probes.cross_entropy_ladder --output bench/results/DATE-cpu-cross-entropy-ladder.json

See `bench.probes.ladder`. A step is a forward and backward pass over one chunk of the vocabulary, of a weight
in the dtype of the products. The steps are in cross_entropy_ladder.cpp.
"""

from __future__ import annotations

from pathlib import Path

from bench.probes.ladder import climb

CASES = {  # rows, D, V
    "512 rows, D 768, V 50258": (512, 768, 50258),
    "128 rows, D 768, V 50258": (128, 768, 50258),
}

if __name__ == "__main__":
    climb(__doc__, Path(__file__).with_suffix(".cpp"), CASES, whole="loss")
