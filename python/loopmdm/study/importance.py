"""Which part of the denoising needs the heavy model: its lead over a light one in bins of t.

Model scheduling (arXiv 2604.02340), Figs 4, 5 and 12. Both models read the same corrupted sequences z_t. In
each bin, over masked tokens:

  loss gap      mean |CE_light - CE_heavy|; signed: mean of CE_light - CE_heavy
  KL            mean KL(heavy || light) of the two predictions, or the other direction
  relative      either of them, less that of the pair of heavy models trained with different seeds

A model with two loop counts, such as run@4 and run@1, stands for a heavy and a light one. Intervals are 95 %
percentile bootstraps over sequences.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.quality.bootstrap import Bootstrap, Floats, Interval
from loopmdm.runs.options import UsageError, positive_int
from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import Row, StudyFolder
from loopmdm.study.kit.inputs import Noisy, digest, masked_log_probs, stratified
from loopmdm.study.kit.sources import (
    MODEL_HELP,
    Denoiser,
    add_data,
    add_whole_boards,
    held_out,
    load_denoisers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "loss gap and KL between light and heavy models in bins of t"
EPILOG = """examples:
  loopmdm study importance heavy light --second-heavy heavy-seed1 --out importance
  loopmdm study importance run@4 run@1 run@2 --out importance-loops
"""
BASELINE = "second heavy"
POOLED_BINS = 4
MEASURES = ("abs_gap", "gap", "kl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heavy", metavar="HEAVY", help=MODEL_HELP)
    parser.add_argument("light", metavar="LIGHT", nargs="+", help="one or more, as HEAVY")
    parser.add_argument(
        "--second-heavy",
        metavar="MODEL",
        help="HEAVY trained with another seed; what it differs by is subtracted in the relative curves."
        " LIGHT must be as independent of HEAVY as this model is: of another seed and order of the data too",
    )
    parser.add_argument(
        "--kl",
        choices=("heavy-light", "light-heavy"),
        default="heavy-light",
        help="direction: KL(first || second) (default: %(default)s)",
    )
    parser.add_argument(
        "--bins",
        type=positive_int,
        default=16,
        metavar="N",
        help=f"bins of t, a multiple of {POOLED_BINS} (default: %(default)s)",
    )
    add_whole_boards(parser)
    add_data(parser)


class Sums(NamedTuple):
    """Sums over the masked tokens of each sequence, [B] float64, between a model and the heavy one."""

    abs_gap: Tensor  # |CE - CE_heavy|
    gap: Tensor  # CE - CE_heavy
    kl: Tensor


def compare(heavy: Denoiser, others: Sequence[Denoiser], noisy: Noisy, kl: str = "heavy-light") -> list[Sums]:
    """The differences between each of `others` and the heavy model on one corrupted batch.

    Raises:
        RuntimeError: two models did not read the same tokens.
    """
    passes = []
    read = set()
    for denoiser in (heavy, *others):
        stages = noisy.stages(denoiser.model)
        read.add(digest(stages.tokens))
        passes.append(stages.after(stages.loop(stages.before(), denoiser.num_loops)))
    if read != {digest(torch.where(noisy.masked, heavy.model.config.mask_token_id, noisy.clean))}:
        raise RuntimeError(f"the models read different tokens: {sorted(read)}")
    sums = torch.zeros(len(others), len(MEASURES), len(noisy.t), dtype=torch.float64)
    predictions = [
        masked_log_probs(denoiser.model, hidden, noisy)
        for denoiser, hidden in zip((heavy, *others), passes, strict=True)
    ]
    for index, (reference, *rest) in enumerate(zip(*predictions, strict=True)):
        truth = noisy.clean[index, noisy.masked[index]].to(reference.device)[:, None]
        for row, log_probs in enumerate(rest):
            gap = (reference - log_probs).gather(1, truth)
            pair = (reference, log_probs) if kl == "heavy-light" else (log_probs, reference)
            divergence = _divergence(*pair)
            sums[row, :, index] = torch.stack([gap.abs().sum(), gap.sum(), divergence]).cpu()
    return [Sums(*rows) for rows in sums]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) summed over the rows [R, V]; tokens excluded from both count nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum()


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    if args.bins % POOLED_BINS:
        raise UsageError(f"--bins: got {args.bins}, expected a multiple of {POOLED_BINS}")
    second = [] if args.second_heavy is None else [args.second_heavy]
    heavy, *others = load_denoisers(args, folder, [args.heavy, *second, *args.light])
    data = held_out(args, folder, heavy)
    starts = [0, *accumulate(len(batch.input_ids) for batch in data.batches)]

    def measure(key: str) -> dict[str, Any]:
        number = int(key.split()[1])
        return measured(heavy, others, data.batches[number], args.bins, args.seed, starts[number], args.kl)

    parts = folder.items([f"batch {i}" for i in range(len(data.batches))], measure, "batches")
    masked = np.concatenate([part["masked"] for part in parts])
    sums = np.concatenate([part["sums"] for part in parts], axis=-2)  # [models, measures, N, bins]
    folder.facts |= {
        "kl": "KL(" + " || ".join(args.kl.split("-")) + ")",
        "corruption_hashes": [part["hash"] for part in parts],
        "network_calls": len(masked) * args.bins * (1 + len(others)),
        "loops": {denoiser.name: denoiser.num_loops for denoiser in (heavy, *others)},
        "intervals": "95 % percentile bootstrap over sequences, 2000 resamples",
    }
    names = [denoiser.name for denoiser in others]
    if second:
        names[0] = BASELINE
    rows = []
    for bins in (args.bins, POOLED_BINS):
        counts, found = curves(names, masked, sums, bins, args.seed)
        rows += table(counts, found)
        for name in names[len(second) :]:
            _conclude(folder, name, found[name], bins, bool(second))
    return rows


def measured(
    heavy: Denoiser,
    others: Sequence[Denoiser],
    batch: Batch,
    bins: int,
    seed: int,
    first: int,
    kl: str = "heavy-light",
) -> dict[str, Any]:
    """Masked tokens [B, bins] and sums [models, measures, B, bins] of a batch, as JSON values."""
    columns = stratified(batch, bins, seed, first)
    sums = [[torch.stack(one) for one in compare(heavy, others, noisy, kl)] for noisy in columns]
    return {
        "masked": torch.stack([noisy.masked.sum(1) for noisy in columns], dim=1).tolist(),
        "sums": torch.stack([torch.stack(one) for one in sums], dim=-1).tolist(),
        "hash": digest(torch.stack([noisy.masked for noisy in columns])),
    }


class Curve(NamedTuple):
    """A measure in bins of t."""

    interval: Interval  # [bins]
    resampled: Floats  # [resamples, bins]

    def peak_inside(self) -> tuple[bool, float]:
        """Whether the largest value is in no outermost bin, and in what share of the resamples."""
        last = self.resampled.shape[1] - 1
        peaks = np.argmax(np.vstack([self.interval.value, self.resampled]), axis=1)
        inside = (peaks > 0) & (peaks < last)
        return bool(inside[0]), float(inside[1:].mean())


Curves = dict[str, dict[str, Curve]]  # by pair, by measure


def curves(names: Sequence[str], masked: Floats, sums: Floats, bins: int, seed: int) -> tuple[Floats, Curves]:
    """Masked tokens [bins], and the curves in `bins` bins from sums in a multiple of as many.

    With the second heavy model first in `names`, the measures `relative_...` are less what it differs by.
    """
    groups = (*masked.shape[:-1], bins, masked.shape[-1] // bins)
    counts = masked.reshape(groups).sum(-1)
    sums = sums.reshape(*sums.shape[:-1], *groups[-2:]).sum(-1)
    bootstrap = Bootstrap(len(masked), seed=seed)
    points = sums.sum(-2) / counts.sum(0)  # [models, measures, bins]
    resampled = np.stack([[bootstrap.ratios(one, counts) for one in model] for model in sums])
    found: Curves = {}
    for i, name in enumerate(names):
        found[name] = {}
        for m, measure in enumerate(MEASURES):
            values = {measure: (points[i, m], resampled[i, m])}
            if names[0] == BASELINE and i:
                values[f"relative_{measure}"] = (
                    points[i, m] - points[0, m],
                    resampled[i, m] - resampled[0, m],
                )
            for key, (point, draws) in values.items():
                found[name][key] = Curve(bootstrap.interval(point, draws), draws)
    return counts.sum(0), found


def table(counts: Floats, found: Curves) -> list[Row]:
    """A row for each pair and bin."""
    bins = len(counts)
    rows = []
    for name, measures in found.items():
        for j in range(bins):
            row: Row = {"pair": name, "bins": bins, "t_low": j / bins, "t_high": (j + 1) / bins}
            row["masked_tokens"] = int(counts[j])
            for measure, curve in measures.items():
                for end, values in zip(("", "_low", "_high"), curve.interval, strict=True):
                    row[measure + end] = float(values[j])
            rows.append(row)
    return rows


def _conclude(folder: StudyFolder, name: str, found: dict[str, Curve], bins: int, subtracted: bool) -> None:
    """Condition M2: both curves have their maximum inside (0, 1)."""
    verdicts, words = [], []
    for measure in ("abs_gap", "kl"):
        curve = found[f"relative_{measure}" if subtracted else measure]
        inside, share = curve.peak_inside()
        peak = int(np.argmax(curve.interval.value))
        verdicts.append(inside)
        words.append(
            f"{measure} {curve.interval.value[peak]:.4f} nats at t = {(peak + 0.5) / bins:.2f}"
            f" (inside in {100 * share:.0f} % of the resamples)"
        )
    what = "less that of two heavy seeds" if subtracted else "nothing subtracted"
    condition = f"{name}, {bins} bins: loss gap and KL ({what}) peak in no outermost bin"
    folder.find("M2" if bins != POOLED_BINS else "M2, pooled", condition, "; ".join(words), all(verdicts))


def draw(rows: Sequence[Row]) -> Figure:
    figure, axes = figures.new_figure(2, 2)
    names = list(dict.fromkeys(figures.column(rows, "pair")))
    subtracted = names[0] == BASELINE
    what = "less two heavy seeds', " if subtracted else ""
    for i, (measure, title) in enumerate({"abs_gap": "|loss gap|", "kl": "KL"}.items()):
        for j, bins in enumerate(sorted({row["bins"] for row in rows}, reverse=True)):
            panel = axes[i, j]
            for color, name in enumerate(names):
                part = figures.select(rows, pair=name, bins=bins)
                middle = [(row["t_low"] + row["t_high"]) / 2 for row in part]
                baseline = name == BASELINE
                if baseline and bins == POOLED_BINS:
                    continue  # it dwarfs the differences
                column = measure if baseline or not subtracted else f"relative_{measure}"
                figures.band(
                    panel,
                    middle,
                    *(figures.column(part, column + end) for end in ("", "_low", "_high")),
                    label="two heavy seeds, not subtracted" if baseline else name,
                    **({"color": "0.55", "linestyle": "--"} if baseline else {"color": f"C{color}"}),
                )
            panel.axhline(0, color="0.3", linewidth=0.8)
            panel.set(xlim=(0, 1), xlabel=figures.TIME_LABEL, ylabel="nats per masked token")
            panel.set_title(f"{title} to the heavy model, {what}{bins} bins")
    axes[0, 0].legend()
    return figure
