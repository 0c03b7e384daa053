"""Losses of training runs against the FLOPs they took, in one figure.

    python -m bench.training_curves base=RUN/metrics.jsonl loop=OTHER/metrics.jsonl --out curves.png

A point is the mean of a twentieth of the records up to it; those of another model, drawn with other loops,
masks and times, are of equal cost, not of equal noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from loopmdm.study.kit import figures
from loopmdm.train import read_metrics
from loopmdm_kernels.files import write_file

_WINDOWS = 20


def curve(metrics: Path) -> tuple[list[float], list[float]]:
    """FLOPs and mean losses of the windows of a run."""
    records = [record for record in read_metrics(metrics) if "loss" in record]
    if len(records) < _WINDOWS:
        raise ValueError(f"{metrics} has {len(records)} records of losses; expected at least {_WINDOWS}")
    windows = np.array_split(np.array([(record["flops"], record["loss"]) for record in records]), _WINDOWS)
    return [float(window[-1, 0]) for window in windows], [float(window[:, 1].mean()) for window in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=METRICS")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with figures.style():
        figure, axes = figures.new_figure()
        for name, _, metrics in (run.partition("=") for run in args.runs):
            axes[0][0].plot(*curve(Path(metrics)), marker="o", label=name)
        axes[0][0].set_xlabel("training FLOPs (blocks+head)")
        axes[0][0].set_ylabel("training loss (nats per token)")
        axes[0][0].legend()
        write_file(args.out, lambda path: figure.savefig(path, format="png"))


if __name__ == "__main__":
    main()
