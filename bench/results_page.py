"""Writes docs/results.md from the committed result files, and prints the table of the README.

python -m bench.results_page docs/results.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.report import processor
from bench.script import arguments
from bench.targets import targets_of
from loopmdm_kernels.files import write_file

RESULTS = Path(__file__).parent / "results"
SPEED = {
    "Zen 5": "2026-11-30-cpu-zen5.json",
    "Zen 5, before, and attention": "2026-11-24-cpu-zen5.json",
    "Zen 5, the head's ops again": "2026-11-29-cpu-zen5-head.json",
    "Zen 5, the loss again": "2026-11-30-cpu-zen5-masked-cross-entropy.json",
    "Zen 5, the training step again": "2026-11-30-cpu-zen5-training-step-peers.json",
    "Zen 5, MDLM's own loop": "2026-11-30-cpu-zen5-drop-in.json",
    "Zen 5, the same where the C library keeps freed memory": "2026-11-30-cpu-zen5-drop-in-kept-memory.json",
    "Zen 5, the same where torch asks for large pages": "2026-11-30-cpu-zen5-drop-in-large-pages.json",
    "Zen 4": "2026-11-24-cpu-zen4.json",
    "Zen 5, tokens of few rows": "2026-11-29-cpu-zen5-sample-rows.json",
    "AVX2, played by a Zen 5": "2026-11-29-cpu-zen5-as-avx2.json",
    "AVX2, the loss again": "2026-11-30-cpu-zen5-as-avx2-masked-cross-entropy.json",
    "AVX2, tokens of few rows": "2026-11-29-cpu-avx2-sample-rows.json",
    "AVX2, a Zen 3 that is shared, the training step": "2026-11-30-cpu-zen3-training-step-peers.json",
}
SAMPLING = {
    "Zen 5": "2026-11-30-cpu-zen5-sampling.json",
    "Ice Lake, no bf16 instructions": "2026-11-24-cpu-sampling.json",
}
PLANS = {"Zen 5": "2026-11-29-cpu-zen5-plans.json"}
# Beside what a user could install instead: `bench.environments`.
OTHERS = {
    "torch 2.13, OpenVINO": "2026-11-29-cpu-zen5-torch-2.13-openvino.json",
    "torch 2.15": "2026-11-29-cpu-zen5-torch-2.15.json",
    "torch 2.13, zentorch": "2026-11-29-cpu-zen5-zentorch.json",
}
OTHER_CASES = {
    "test_looped_blocks[D768-T1024-bf16]": "`looped_blocks`, S = 12, D 768, 1024 tokens",
    "test_looped_blocks[D768-T128-bf16]": "`looped_blocks`, S = 12, D 768, 128 tokens",
    "test_looped_blocks[D768-T1024-fp32]": "`looped_blocks` in fp32, 1024 tokens",
    "test_model": "whole small model, S = 12, 1024 tokens",
    "test_training_step": "training step, 12 blocks of D 384, 2048 tokens, S = 6",
    "test_masked_cross_entropy[bf16-parameters]": "`masked_cross_entropy` with gradients, 512 rows, V 50258",
    "test_masked_cross_entropy[fp32-parameters]": "the same, parameters in fp32",
}
BOARDS = {
    "6x6, 166 k parameters, S <= 6 in training": "2026-11-21-sudoku6-eval.json",
    "9x9, 835 k parameters, S <= 8 in training": "2026-11-21-sudoku9-eval.json",
}
# What a case of `make bench` is.
CASES = {
    "test_looped_blocks[D768-T1024-bf16]": "`looped_blocks`, 2 blocks, S = 12: D 768, 1024 tokens",
    "test_looped_blocks[D768-T128-bf16]": "the same, 128 tokens",
    "test_looped_blocks[D256-T81-bf16]": "the same, D 256, 81 tokens",
    "test_looped_blocks[D256-B64xL81-bf16]": "the same, D 256, 64 sequences of 81",
    "test_looped_blocks[D768-T1024-fp32]": "`looped_blocks` in fp32, 2 blocks, S = 12: D 768, 1024 tokens",
    "test_looped_blocks[D768-T128-fp32]": "the same, 128 tokens",
    "test_looped_blocks[D256-T81-fp32]": "the same, D 256, 81 tokens",
    "test_looped_blocks[D256-B64xL81-fp32]": "the same, D 256, 64 sequences of 81",
    "test_model": "whole small model, 1024 tokens, V 50258, S = 12",
    "test_training_step": "training step, 12 blocks of D 384, 4 x 512 tokens, S = 6",
    "test_drop_in": "training step of MDLM's own loop with our network, 4 blocks of D 768, 2 x 256 tokens",
    "test_attention[12x1024x64-forward]": "`attention`, 12 heads x 1024 x 64",
    "test_attention[12x1024x64-forward-backward]": "the same with its gradients",
    "test_attention[12x256x64-forward]": "`attention`, 12 heads x 256 x 64",
    "test_attention[12x256x64-forward-backward]": "the same with its gradients",
    "test_attention[512x81x32-forward]": "`attention`, 512 heads x 81 x 32",
    "test_attention[512x81x32-forward-backward]": "the same with its gradients",
    "test_masked_cross_entropy[bf16-parameters]": "`masked_cross_entropy` with gradients, 512 rows, V 50258",
    "test_masked_cross_entropy[fp32-parameters]": "the same, parameters in fp32",
    "test_head_logits[bf16-forward]": "`head_logits`, 512 rows, V 50258",
    "test_head_logits[bf16-forward-backward]": "the same with its gradients",
    "test_head_logits[fp32-forward]": "`head_logits` in fp32",
    "test_head_logits[fp32-forward-backward]": "the same with its gradients",
    "test_sample_rows[R1]": "`sample_rows`, 1 row, V 50258",
    "test_sample_rows[R16]": "the same, 16 rows",
    "test_sample_rows[R256]": "the same, 256 rows",
    "test_sample_tokens[R1]": "`sample_rows` without statistics, 1 row, V 50258",
    "test_sample_tokens[R16]": "the same, 16 rows",
    "test_sample_tokens[R256]": "the same, 256 rows",
}
# The front page and the targets: files by the dtype that is fast; where several have a case the last counts.
COLUMNS = {
    "bf16": [
        SPEED["Zen 5"],
        SPEED["Zen 5, the loss again"],
        SPEED["Zen 5, the training step again"],
        SPEED["Zen 5, MDLM's own loop"],
        SPEED["Zen 5, tokens of few rows"],
        SAMPLING["Zen 5"],
    ],
    "AVX2, fp32": [
        SPEED["AVX2, played by a Zen 5"],
        SPEED["AVX2, the loss again"],
        SPEED["AVX2, tokens of few rows"],
    ],
}
LOSS = "`masked_cross_entropy` with gradients, 512 rows, V 50258"
FRONT = {
    "`looped_blocks`, S = 12, D 768, 1024 tokens": "test_looped_blocks[D768-T1024-{dtype}]",
    "whole small model, S = 12, 1024 tokens": "test_model",
    "training step, 12 blocks of D 384, 2048 tokens, S = 6": "test_training_step",
    LOSS: "test_masked_cross_entropy[{dtype}-parameters]",
    "`sample_rows`, 256 rows, V 50258": "test_sample_rows[R256]",
    "sampling, S = 12, 1024 tokens, 8 steps": "test_sampling[S12]",
}
# Where a share of the peak rate says nothing: the weights are read for few rows, or products are of bytes.
WITHOUT_SHARE = {f"test_sample_rows[{rows}]" for rows in ("R1", "R16")}
WITHOUT_SHARE |= {f"test_sample_tokens[{rows}]" for rows in ("R1", "R16", "R256")}


ABOUT_REPORT = """## One run as a page

`loopmdm bench --html report.html` times the ops on your machine and writes one page that fetches nothing:
speed-ups with intervals, a roofline, cost against S, length and batch, memory against S, and the error
against float64. [This one](report.html) is of a Zen 5, from `2026-11-29-cpu-zen5-report.json`, by `loopmdm
bench --dtype bfloat16 --threads 2 --repeats 9 --html report.html --json`: x [1, 256, 768], S = 4.

![speed-ups over plain PyTorch with intervals, and a roofline](report.png)

`loopmdm bench --compare OLD.json`, with what `--json` printed then, says which kernels moved: those whose
intervals of the speed-up over plain PyTorch have nothing in common. A machine that is slower today slows
PyTorch too, and moves none. The day after, beside the run of that page (`{compared}`):

```
{table}
```
"""
COMPARED = "2026-11-30-cpu-zen5-compare.txt"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def origin(machine: str, name: str) -> str:
    """The machine, the file and the command behind a table."""
    result = load(name)
    rates = result["machine"]["giga_per_second"]
    return (
        f"{machine}: {processor(result['machine'])}; torch {result['versions']['torch']}; "
        f"peak {rates['peak_bf16']:.0f} GFLOP/s in bf16 and {rates['peak_fp32']:.0f} in fp32, "
        f"measured in the run. `{name}`, "
        f"by `{result['command']}`."
    )


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def speed(machine: str, name: str) -> list[str]:
    figures = load(name)["figures"]
    rows = []
    for case, title in CASES.items():
        if case not in figures:
            continue
        result = figures[case]
        times, peer = result["milliseconds"], result["best_peer"]
        share = "" if case in WITHOUT_SHARE else f"{100 * result['share_of_peak']:.0f} %"
        ours, best = milliseconds(times["ours"]), milliseconds(times[peer])
        row = [title, ours, best, peer, f"{result['speedup']:.2f}", share]
        rows.append([*row, f"{result.get('speedup_with_bf16_parameters', '')}"])
    header = ["case", "ours, ms", "best PyTorch, ms", "which", "speed-up", "of peak", "with bf16 parameters"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return [origin(machine, name), "", *table(header, rows), ""]


def latest(names: Sequence[str]) -> dict[str, Any]:
    """The figures of some files; where several have a case the last counts."""
    return {case: figure for name in names for case, figure in load(name)["figures"].items()}


def front_table() -> str:
    columns = {column: latest(names) for column, names in COLUMNS.items()}
    rows = []
    for title, case in FRONT.items():
        row = [title]
        for column, figures in columns.items():
            result = figures.get(case.format(dtype=column[-4:]))
            if result is None:
                row += ["", "", ""]
                continue
            times = [result["milliseconds"][whose] for whose in ("ours", result["best_peer"])]
            row += [*map(milliseconds, times), f"{result['speedup']:.2f}"]
        rows.append(row)
    header = [
        f"{column}: {name}" for column in COLUMNS for name in ("ours, ms", "best PyTorch, ms", "speed-up")
    ]
    return "\n".join(table(["case", *header], rows)) + "\n"


def program(peer: str) -> str:
    """What a peer is of: PyTorch eager and compiled are one, an option of its fused loss stands alone."""
    first = peer.split()[0]
    if first.startswith("linear_cross_entropy"):
        return peer
    return "PyTorch" if first in ("eager", "compiled") else first


def others() -> list[str]:
    """Of each case and each program the fastest variant, beside ours in the same process."""
    rows = []
    for number, (case, title) in enumerate(OTHER_CASES.items()):
        for environment, name in OTHERS.items():
            result = load(name)["figures"].get(case, {"milliseconds": {}})
            times = {
                peer: time for peer, time in result["milliseconds"].items() if not peer.startswith("ours")
            }
            kinds = dict.fromkeys(map(program, times))
            if not any(peer.startswith("compiled") for peer in times):  # zentorch takes its place
                kinds.pop("PyTorch", None)
            for kind in kinds:
                best = min((peer for peer in times if program(peer) == kind), key=lambda peer: times[peer])
                ratio = times[best] / result["milliseconds"]["ours"]
                found = [milliseconds(time) for time in (times[best], result["milliseconds"]["ours"])]
                rows.append((number, ratio, [title, best, environment, *found]))
    rows.sort(key=lambda row: row[:2])
    lines = [[*cells, f"{ratio:.2f}"] for _, ratio, cells in rows]
    header = ["case", "peer", "environment", "peer, ms", "ours, ms", "speed-up"]
    files = ", ".join(f"`{name}`" for name in OTHERS.values())
    return [*table(header, lines), "", f"{files}.", ""]


def aims() -> list[str]:
    """Each target, and at which share of the peak it would be reached beside the peer of the run."""
    lines = []
    for column, names in COLUMNS.items():
        figures, rows = latest(names), []
        for case, target in targets_of(load(names[0])["machine"]["cpu_isa"]).items():
            if case not in figures:
                continue
            speedup, share = figures[case]["speedup"], figures[case]["share_of_peak"]
            wanted = "" if target.share_of_peak is None else f"{100 * target.share_of_peak:.0f} %"
            shares = [f"{100 * share:.0f} %", wanted, f"{100 * share * target.speedup / speedup:.0f} %"]
            title = CASES.get(case, f"sampling, S = {case[15:-1]}")
            rows.append([title, f"{speedup:.2f}", f"{target.speedup:.2f}"])
            rows[-1] += ["", "", ""] if case in WITHOUT_SHARE else shares
        header = [
            column,
            "speed-up",
            "wanted",
            "of peak",
            "wanted share",
            "share that the wanted speed-up is",
        ]
        lines += [*table(header, rows), "", ", ".join(f"`{name}`" for name in names) + ".", ""]
    return lines


def sampling(machine: str, name: str) -> list[str]:
    figures = load(name)["figures"]
    rows = []
    for loops in (1, 12):
        result = figures[f"test_sampling[S{loops}]"]
        times, peer = result["milliseconds"], result["best_peer"]
        ratios = (f"{result[name]:.2f}" for name in ("speedup", "speedup_of_the_sampler_alone"))
        rows.append([f"S = {loops}", f"{times['ours'] / 1e3:.2f}", f"{times[peer] / 1e3:.2f}", peer, *ratios])
    header = ["", "ours, s", "best PyTorch, s", "which", "speed-up", "on eager PyTorch"]
    lines = [origin(machine, name), "", *table(header, rows), ""]
    calls = figures.get("test_network_calls")
    if calls is None:
        return lines
    return [
        *lines,
        f"In a batch of 16 a sequence takes {calls['calls_per_sequence']:.0f} network calls (expected: "
        f"{calls['expected']}), with the reference's cache over the whole batch "
        f"{calls['reference_calls_per_sequence']}.",
        "",
    ]


def plans(machine: str, name: str) -> list[str]:
    rows = []
    for case, result in load(name)["figures"].items():
        model, batch = case.split("[")[1].rstrip("]").split("-")
        for plan, share in result["flops_saved"].items():
            milliseconds = 1000 * result["seconds"][plan] / result["steps"]
            before, after = (result[f"time_saved{end}"][plan] for end in ("_in_python", ""))
            reaches = f"{result['reaches_the_clock'][plan]:.2f}"
            saved = [f"{100 * part:.0f} %" for part in (share, before, after)]
            rows.append([model, batch, plan, f"{milliseconds:.2f}", *saved, reaches])
    header = ["model", "batch", "plan", "ms a step", "FLOPs saved", "time saved, Python between steps"]
    header += ["time saved", "time over FLOPs saved"]
    return [origin(machine, name), "", *table(header, rows), ""]


def boards() -> list[str]:
    counts = (1, 2, 3, 4, 6, 8, 12)
    rows, files = [], []
    for model, name in BOARDS.items():
        result = load(name)
        files.append(f"`{name}` ({result['puzzles']} puzzles)")
        for order in ("left_to_right", "confidence"):
            solved = {r["num_loops"]: r["share_solved"] for r in result["solved"] if r["order"] == order}
            cells = [f"{solved[s]:.3f}".lstrip("0") if s in solved else "" for s in counts]
            rows.append([model, order.replace("_", " "), *cells])
    return [*table(["model", "order", *(f"S = {s}" for s in counts)], rows), "", ", ".join(files) + "."]


OPENING = """# Results

Written by `python -m bench.results_page docs/results.md` from the files in `bench/results/`. Times are
medians; peers ran in the same process. The best PyTorch is the best of eager and `torch.compile`, in fp32
and bf16 (bf16 is left out of long cases where torch's product of it crawls: without instructions for it).
`make bench ISA=avx2` holds all libraries to AVX2. No figure of a GPU is here yet: none has been measured.
"""
ABOUT_BOARDS = """## Sudoku: what loops are for

Shares of held-out puzzles that the shipped models solve exactly, one cell a step. Left to right takes the
choice of easy cells away; what is left is computation inside the step.
"""
ABOUT_KERNELS = """## Kernels on a CPU

The share of the peak is that of the instructions' rate in the case's dtype. Nothing that is computed twice
counts. Shares are left out where few rows read the whole weight.
"""
ABOUT_AIMS = """## What was wanted

The targets of `bench/targets.py`. Where one is missed the last column says why: it is the share of the peak
rate at which our kernels would be that much faster than the peer of the run. Near or above 100 % no kernel
can be. A block by itself reaches 79 to 93 % ([where the rest goes](kernels/looped_blocks.md#cpu)), a training
step loses [by phase](kernels/looped_blocks.md#where-a-training-step-goes), and the loss has
[a ladder](kernels/masked_cross_entropy.md). Few rows of tokens are bound by reading the weight once, which
PyTorch reads in bf16 where we are given fp32 ([measured.md](measured.md)).
"""
ABOUT_OTHERS = """## What else a user could install

The same cases by `python -m bench.environments`: newer and other programs, each in an environment of its own,
beside our kernels in the same process. Of each program the fastest variant; the fastest peer first. A
speed-up below 1 is a case that the peer wins. OpenVINO runs the whole model as one graph with all its loops.
zentorch runs without one of its passes, which fails on these blocks; no other program was helped. Intel's
extension ended with torch 2.8, which is older than what this package takes.
"""
ABOUT_SAMPLING = """## Sampling on a CPU

The small model beside the reference's algorithm (`ddpm_cache` in plain PyTorch): 1024 tokens, T = 1024,
batch 1; 8 steps, of which 5 compute. The last column is our sampler on eager PyTorch, beside the reference's.
"""
ABOUT_PLANS = """## Adaptive loops, on the clock

Boards, alone and in a batch of 16, beside the same run at the largest number of loops: plans that end the
loop where the hidden state changes by less than .2 or .3, and one loop. `sample` takes the steps in compiled
code; the same with Python between the network calls stands beside it.
"""


def page() -> str:
    lines = [OPENING, ABOUT_BOARDS, *boards(), "", ABOUT_KERNELS]
    lines += [line for machine, name in SPEED.items() for line in speed(machine, name)]
    lines += [ABOUT_AIMS, *aims(), ABOUT_OTHERS, *others(), ABOUT_SAMPLING]
    lines += [line for machine, name in SAMPLING.items() for line in sampling(machine, name)]
    lines += [ABOUT_PLANS]
    lines += [line for machine, name in PLANS.items() for line in plans(machine, name)]
    table_of_moves = (RESULTS / COMPARED).read_text(encoding="utf-8").rpartition("\n\n")[2].rstrip()
    lines += [ABOUT_REPORT.format(compared=COMPARED, table=table_of_moves)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    write_file(*arguments(__doc__, "page"), page())
    print(front_table(), end="")
