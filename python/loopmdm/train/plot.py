"""The loss curve of a run."""

from __future__ import annotations

from pathlib import Path

from loopmdm.train.metrics import METRICS_FILE, averages, held_out, read_metrics
from loopmdm_kernels.files import write_files

PLOT_FILE = "loss.png"


def plot_loss(out_dir: str | Path) -> Path:
    """Draw out_dir/metrics.jsonl into out_dir/loss.png: training loss, held-out NLL of each S if logged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(out_dir)
    records = read_metrics(folder / METRICS_FILE)
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    if not training:
        raise ValueError(f"{folder / METRICS_FILE} has no training record yet")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*training, strict=True), color="0.8", linewidth=0.8, label="training loss, one step")
    axes.plot(*zip(*averages(training), strict=True), color="C0", label="training loss, averaged")
    for color, (num_loops, points) in enumerate(held_out(records).items(), start=1):
        label = f"held out, S = {num_loops}"
        axes.plot(*zip(*points, strict=True), color=f"C{color}", marker=".", label=label)
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    axes.set_ylim(bottom=0, top=1.15 * max(loss for _, loss in averages(training)))
    axes.legend()
    write_files({folder / PLOT_FILE: lambda path: figure.savefig(path, format="png", dpi=120)})
    plt.close(figure)
    return folder / PLOT_FILE
