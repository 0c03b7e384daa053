"""How much masked positions attend to each other, in every looped layer, as the loop runs.

LoopMDM, Fig. 5. After S applications the layer l attends with Att (mean over heads); M_t are the masked
positions of a sequence of L tokens:

  mass   A_mm(l, S, t) = mean over masked queries i of the sum over j in M_t of Att(i, j)
  lift   the same, each query's mass divided by the masked share |M_t| / L: 1 = no preference

A plain model that was never trained with a loop can be looped over the same layers beside it (--naive): a
rise with S that it shows too is no sign of a learned mechanism. Intervals are 95 % percentile bootstraps
over sequences. For Sudoku, t is the share of the blanks that is masked.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from loopmdm.model import LoopMDM
from loopmdm.model.modules import DDiTBlock
from loopmdm.quality.bootstrap import Bootstrap
from loopmdm.runs.options import UsageError, loop_counts
from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import Row, StudyFolder
from loopmdm.study.kit.inputs import Noisy, at_times, times
from loopmdm.study.kit.sources import (
    Denoiser,
    add_data,
    add_whole_boards,
    check_vocabularies,
    held_out,
    load_denoisers,
)
from loopmdm_kernels.reference.looped_blocks import modulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "attention between masked positions in each looped layer, over the loops"
EPILOG = """examples:
  loopmdm study attention run --naive plain --out attention
  loopmdm study attention sudoku6 --times 1 --loops 1,2,3,6,12,24 --out attention-sudoku
"""
RISE = 1.05  # L8: the least rise over S = 1 that counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or shipped model with a loop")
    parser.add_argument(
        "--naive", metavar="PLAIN", help="a model trained without a loop, looped over the same layers"
    )
    parser.add_argument(
        "--loops",
        type=loop_counts,
        metavar="S,S,...",
        help="loop counts (default: 1, 2, 3, 4, the model's max_loops and twice that)",
    )
    parser.add_argument(
        "--times",
        type=times,
        default=[0.25, 0.5, 0.75],
        metavar="T,T,...",
        help="in (0, 1] (default: 0.25,0.5,0.75)",
    )
    add_whole_boards(parser)
    add_data(parser)


def attention_probabilities(model: LoopMDM, index: int, x: Tensor, noisy: Noisy) -> Tensor:
    """Att [B, H, L, L] of block `index` at the residual stream x [B, L, D], in plain PyTorch."""
    config = model.config
    block = cast(DDiTBlock, model.blocks[index])
    modulation = block.adaLN_modulation(model.condition(noisy.sigma(model)))
    shift, scale = modulation.view(-1, 1, 6, config.hidden_size).unbind(2)[:2]
    qkv = block.attn_qkv(modulate(block.norm1(x), shift, scale).to(scale.dtype))
    q, k, _ = qkv.view(*x.shape[:2], 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
    if config.positions == "rotary":
        cos, sin = model.rotary_emb(x.shape[1])
        q, k = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
            for a, b in (part.chunk(2, dim=-1) for part in (q, k))
        )
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    keys = noisy.keys(model)
    if keys is not None:
        scores = scores.masked_fill(~keys.bool()[:, None, None], -math.inf)
    probabilities: Tensor = scores.softmax(-1)
    return probabilities


def apply_block(model: LoopMDM, index: int, x: Tensor, noisy: Noisy) -> Tensor:
    """The residual stream behind block `index`."""
    return noisy.stages(model).block(x, index)


def mask_to_mask(model: LoopMDM, noisy: Noisy, loops: Sequence[int]) -> Tensor:
    """Attention from masked to masked positions, summed over the masked queries: [len(loops), layers, B].

    One forward pass of max(loops) loops; float64, divide by the number of masked tokens.
    """
    stages = noisy.stages(model)
    masked = noisy.masked.to(model.device)
    state, results = stages.before(), []
    for loop in range(1, max(loops) + 1):
        if loop in loops:
            x, layers = state, []
            for index in range(model.config.loop_start, model.config.loop_end):
                probabilities = attention_probabilities(model, index, x, noisy).mean(1).double()
                to_masked = (probabilities * masked[:, None]).sum(-1)
                layers.append((to_masked * masked).sum(-1))
                x = stages.block(x, index)
            results.append(torch.stack(layers))
        state = stages.loop(state, done=loop - 1)
    return torch.stack(results).cpu()


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    (trained,) = load_denoisers(args, folder, [args.model])
    config = trained.model.config
    if config.loop_start == config.loop_end:
        raise UsageError(f"{args.model} has no looped layers")
    denoisers = [trained]
    if args.naive is not None:
        looped = {"loop_start": config.loop_start, "loop_end": config.loop_end}
        denoisers += load_denoisers(args, folder, [args.naive], **looped)
        check_vocabularies(denoisers)
    loops = sorted(args.loops or {1, 2, 3, 4, config.max_loops, 2 * config.max_loops})
    data = held_out(args, folder, trained)
    starts = [0, *accumulate(len(batch.input_ids) for batch in data.batches)]

    def measure(key: str) -> dict[str, Any]:
        number = int(key.split()[1])
        columns = at_times(data.batches[number], args.times, args.seed, starts[number])
        return {
            "masked": [noisy.masked.sum(1).tolist() for noisy in columns],
            "keys": [_attended(trained.model, noisy).tolist() for noisy in columns],
            "mass": [
                [mask_to_mask(denoiser.model, noisy, loops).tolist() for noisy in columns]
                for denoiser in denoisers
            ],
        }

    parts = folder.items([f"batch {i}" for i in range(len(data.batches))], measure, "batches")
    masked, keys, mass = (
        np.concatenate([part[name] for part in parts], axis=-1) for name in ("masked", "keys", "mass")
    )
    folder.facts |= {
        "loops": loops,
        "network_calls": masked.shape[-1] * len(args.times) * len(denoisers),
        "loops_per_call": max(loops),
        "intervals": "95 % percentile bootstrap over sequences, 2000 resamples",
    }
    rows = table(denoisers, args.times, loops, masked, keys, mass, args.seed)
    _conclude(folder, rows, args.times, loops, config.max_loops)
    return rows


def _attended(model: LoopMDM, noisy: Noisy) -> Tensor:
    """How many keys each sequence has, [B]."""
    keys = noisy.keys(model)
    size, length = noisy.clean.shape
    return torch.full((size,), length) if keys is None else keys.bool().sum(1).cpu()


def table(
    denoisers: Sequence[Denoiser],
    times: Sequence[float],
    loops: Sequence[int],
    masked: Any,
    keys: Any,
    mass: Any,
    seed: int,
) -> list[Row]:
    """Rows from masked and keys [times, N], mass [models, times, loops, layers, N]."""
    bootstrap = Bootstrap(masked.shape[-1], seed=seed)
    rows = []
    for (m, j, s, layer), _ in np.ndenumerate(mass[..., 0]):
        count, sums = masked[j], mass[m, j, s, layer]
        share = bootstrap.ratio(count * count / keys[j], count)  # as the queries see it
        lifted = np.divide(sums * keys[j], count, out=np.zeros(len(count)), where=count > 0)
        row: Row = {
            "model": denoisers[m].name,
            "trained_with_loop": m == 0,
            "layer": denoisers[m].model.config.loop_start + layer,
            "t": times[j],
            "num_loops": loops[s],
            "max_loops_in_training": denoisers[0].model.config.max_loops,
            "masked_share": float(share.value),
        }
        estimates = {"mass": bootstrap.ratio(sums, count), "lift": bootstrap.ratio(lifted, count)}
        if 1 in loops:
            once = mass[m, j, loops.index(1), layer]
            estimates["rise"] = bootstrap.ratio(sums - once, once)  # A(S) / A(1) - 1
        for name, estimate in estimates.items():
            for end, value in zip(("", "_low", "_high"), estimate, strict=True):
                row[name + end] = float(value)
        rows.append(row)
    return rows


def _conclude(
    folder: StudyFolder, rows: Sequence[Row], times: Sequence[float], loops: Sequence[int], most: int
) -> None:
    """Condition L8 at the time nearest to 0.5; it is about the first looped layer."""
    t = min(times, key=lambda value: abs(value - 0.5))
    first = rows[0]["layer"]
    curves = dict.fromkeys((row["trained_with_loop"], row["layer"]) for row in rows)
    for trained, layer in curves:
        part = figures.select(rows, t=t, layer=layer, trained_with_loop=trained)
        mass = dict(zip(loops, figures.column(part, "mass"), strict=True))
        early = [s for s in (2, 3, 4) if s in mass]
        outcome = ", ".join(_point(row) for row in part)
        outcome += f"; share of masks {part[0]['masked_share']:.3f}"
        about = f"{part[0]['model']}, layer {layer}, t = {t:g}"
        if not trained:
            folder.find("L8", f"{about}: a rise without training is no evidence", outcome, None)
            continue
        rises = all(mass[s] >= RISE * mass[1] for s in early) if 1 in mass and early else None
        name = "L8" if layer == first else f"L8, layer {layer}"
        folder.find(name, f"{about}: mass at S = 2, 3, 4 is 5 % above S = 1", outcome, rises)
        if {1, most, 2 * most} <= set(mass):
            late, whole = abs(mass[2 * most] - mass[most]), abs(mass[most] - mass[1])
            condition = f"{about}: saturates, |A(2 S_max) - A(S_max)| < 0.5 |A(S_max) - A(1)|"
            folder.find(f"{name} (soft)", condition, f"{late:.4f} and 0.5 x {whole:.4f}", late < whole / 2)


def _point(row: Row) -> str:
    """A mass and its rise over S = 1."""
    rise = ""
    if row["num_loops"] > 1 and "rise" in row:
        rise = f" ({row['rise']:+.1%} [{row['rise_low']:+.1%}, {row['rise_high']:+.1%}])"
    return f"{row['mass']:.3f}{rise} at S = {row['num_loops']}"


def draw(rows: Sequence[Row]) -> Figure:
    layers = sorted({row["layer"] for row in rows})
    times = sorted({row["t"] for row in rows})
    figure, axes = figures.new_figure(2, len(layers))
    for column, layer in enumerate(layers):
        for color, t in enumerate(times):
            for looped in dict.fromkeys(figures.column(rows, "trained_with_loop")):
                part = figures.select(rows, layer=layer, t=t, trained_with_loop=looped)
                x = figures.column(part, "num_loops")
                options = {
                    "color": f"C{color}",
                    "linestyle": "-" if looped else "--",
                    "label": f"{part[0]['model']}{'' if looped else ' (trained without loop)'}, t = {t:g}",
                }
                for row, name in enumerate(("mass", "lift")):
                    values = [figures.column(part, name + end) for end in ("", "_low", "_high")]
                    figures.band(axes[row, column], x, *values, **options)
            share = figures.select(rows, layer=layer, t=t)[0]["masked_share"]
            axes[0, column].axhline(share, color=f"C{color}", linestyle=":", linewidth=1)
        axes[0, column].set_title(f"layer {layer}: mask-to-mask attention (dotted: share of masks)")
        axes[1, column].set_title(f"layer {layer}: lift over the share of masks")
        axes[0, column].set_ylabel("attention mass on masked positions")
        axes[1, column].set_ylabel("mass / share of masks")
        for panel in axes[:, column]:
            panel.axvline(rows[0]["max_loops_in_training"], color="0.6", linestyle="-.", linewidth=1)
            panel.set_xscale("log", base=2)
            panel.set_xlabel("loops S (log scale; vertical line: the most in training)")
            loops = sorted({row["num_loops"] for row in rows})
            panel.set_xticks(loops, map(str, loops))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(times))
    return figure
