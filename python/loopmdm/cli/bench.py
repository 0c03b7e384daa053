"""Time the kernels on this machine beside plain PyTorch, or tune the Triton kernels for its GPU.

Times `looped_blocks`, `masked_cross_entropy` and `sample_rows` at the sizes of a preset, ours and the PyTorch
reference in turns. The table gives medians and the spread, the slowest less the fastest over the median;
GFLOP/s of the mathematics (a multiply-add is two, what is computed again is not counted); and their
share of the peak of the processor's instructions, which is measured in the same run. With --tune nothing is
compared: tile sizes of the Triton kernels are timed, and the best go to a table that
LOOPMDM_TRITON_TILES=TABLE.json puts to use. The file is written after each kernel and shape; the same command
goes on where an interrupted one was.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import loopmdm_kernels as lk
from loopmdm.cli.output import print_json, print_table, writable
from loopmdm.cli.parser import add_json, add_runtime, set_up
from loopmdm.model.config import PRESETS
from loopmdm.runs.options import UsageError, positive_int
from loopmdm.terminal import note
from loopmdm_kernels.testing import head_inputs, interleaved_times, looped_inputs, row_rng
from loopmdm_kernels.types import BlockWeights, Head, Rotary, RowRng

EPILOG = """examples:
  loopmdm bench
  loopmdm bench --dtype bfloat16 --loops 12 --length 1024
  loopmdm bench --tune tiles.json
"""
VOCABULARY = 50_258
_PEAK_MS = 15.0
_TUNED = {"batches": ((16, 1024), (1, 1024), (1, 128)), "rows": 64}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = sorted(name for name, fields in PRESETS.items() if "vocab_size" not in fields)
    parser.add_argument("--preset", choices=sizes, default="small", help="sizes of the model (default small)")
    parser.add_argument("--tune", type=Path, metavar="TABLE.json", help="tune the Triton kernels instead")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="B", help="sequences (default 1)")
    parser.add_argument("--length", type=positive_int, default=256, metavar="L", help="tokens of each (256)")
    parser.add_argument("--loops", type=positive_int, default=4, metavar="S", help="loops of two blocks (4)")
    parser.add_argument("--rows", type=positive_int, default=64, metavar="R", help="rows drawn at once (64)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of parameters and products")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="medians of N (5)")
    parser.add_argument(
        "--backend", choices=("cpu", "triton"), help="whose kernels (default: cpu, or triton on a GPU)"
    )
    add_json(parser, "the figures")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    device = set_up(args)
    if args.tune is not None:
        return _tune(args, device)
    backend = args.backend or ("triton" if device.type == "cuda" else "cpu")
    machine = _machine(backend, device)
    note(f"{machine}; {args.preset}, {args.dtype}, {args.repeats} turns of each after one to warm up")
    peak = _Peak(backend, device, _DTYPES[args.dtype])
    figures: dict[str, Any] = {}
    for case in _cases(args, device):
        note(f"  {case.name}: {case.shape} ...")
        peak.measure()
        figures[case.name] = {"shape": case.shape, **_measured(case.call, backend, args.repeats)}
    peak.measure()
    for figure in figures.values():
        rate = figure["gflops"][backend]
        figure["share_of_peak"] = None if peak.gflops is None else round(rate / peak.gflops, 3)
    if args.json:
        sizes = {
            name: getattr(args, name) for name in ("preset", "batch", "length", "loops", "rows", "dtype")
        }
        threads = torch.get_num_threads()
        about = {"device": str(device), "threads": threads, "backend": backend, "peak_gflops": peak.gflops}
        print_json({**sizes, **about, "figures": figures})
        return 0
    print(machine + ("" if peak.gflops is None else f", peak {peak.gflops:.0f} GFLOP/s in {args.dtype}"))
    print_table(
        ("", "shape", f"{backend}, ms", "spread", "PyTorch, ms", "spread", "ratio", "GFLOP/s", "of peak"),
        [_row(name, figure, backend) for name, figure in figures.items()],
    )
    return 0


def _row(name: str, figure: dict[str, Any], backend: str) -> tuple[str, ...]:
    share = figure["share_of_peak"]
    return (
        name,
        figure["shape"],
        *(
            cell
            for which in (backend, "reference")
            for cell in (f"{figure['ms'][which]:.1f}", f"{figure['spread'][which]:.0%}")
        ),
        f"{figure['ratio']:.2f}",
        f"{figure['gflops'][backend]:.4g}",
        "-" if share is None else f"{share:.0%}",
    )


def _measured(call: Callable[[], Any], backend: str, repeats: int) -> dict[str, Any]:
    """Medians in ms, spreads and rates of the backend and of plain PyTorch, timed in turns."""
    variants = {which: _with(which, call) for which in (backend, "reference")}
    with FlopCounterMode(display=False) as counter:
        variants[backend]()
    flops = counter.get_total_flops()
    times = interleaved_times(variants, repeats=repeats, warmup=1)
    medians = {which: statistics.median(values) for which, values in times.items()}
    return {
        "ms": {which: round(1000 * value, 3) for which, value in medians.items()},
        "spread": {which: round((max(v) - min(v)) / medians[which], 3) for which, v in times.items()},
        "ratio": round(medians["reference"] / medians[backend], 2),
        "flops": flops,
        "gflops": {which: float(f"{flops / value / 1e9:.5g}") for which, value in medians.items()},
    }


class _Peak:
    """The rate of the processor's instructions, the best of several short looks; None: it is not known."""

    def __init__(self, backend: str, device: torch.device, dtype: torch.dtype) -> None:
        self._known = backend == "cpu" and device.type == "cpu" and dtype != torch.float16
        self._narrow = dtype == torch.bfloat16
        self.gflops: float | None = None

    def measure(self) -> None:
        if self._known:
            extension: Any = importlib.import_module("loopmdm_kernels._C")
            rate = extension.cpu_peak_flops(self._narrow, torch.get_num_threads(), _PEAK_MS)
            self.gflops = max(self.gflops or 0.0, round(rate / 1e9, 1))


def _machine(backend: str, device: torch.device) -> str:
    if device.type == "cuda":
        return f"{backend} on {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return (
        f"{backend} ({lk.available_backends()[backend]}), {threads} {'thread' if threads == 1 else 'threads'}"
    )


def _tune(args: argparse.Namespace, device: torch.device) -> int:
    reason = lk.available_backends()["triton"]
    if reason is not True:
        raise RuntimeError(f"--tune needs a GPU and Triton: {reason}")
    if args.json:
        raise UsageError("--json: --tune prints no figures, its table is a JSON file")
    writable("--tune", args.tune)
    tuning: Any = importlib.import_module("loopmdm_kernels.triton.tuning")
    fields = PRESETS[args.preset]
    workload = tuning.Workload(fields["hidden_size"], fields["num_heads"], VOCABULARY, **_TUNED)
    with torch.no_grad():
        table = tuning.tune(args.tune, workload, device, report=note)
    note(f"{args.tune}: {len(table)} entries; LOOPMDM_TRITON_TILES={args.tune} puts them to use")
    return 0


def _with(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with lk.use_backend(backend):
            return call()

    return run


class _Case(NamedTuple):
    name: str
    shape: str
    call: Callable[[], Any]


def _cases(args: argparse.Namespace, device: torch.device) -> list[_Case]:
    """What is timed."""
    dtype, batch, length = _DTYPES[args.dtype], args.batch, args.length
    hidden_size, heads = PRESETS[args.preset]["hidden_size"], PRESETS[args.preset]["num_heads"]
    inputs = looped_inputs(batch, length, hidden_size, heads, 2).to(dtype)
    blocks = [BlockWeights(*(w.to(device) for w in block)) for block in inputs.blocks]
    x, modulation = inputs.x.to(device), inputs.modulation.to(device)
    assert inputs.rotary is not None
    rotary = Rotary(*(angle.to(device) for angle in inputs.rotary))
    hidden, wide = head_inputs(batch, length, hidden_size, VOCABULARY, excluded_token=VOCABULARY - 1)
    hidden = hidden.float().to(device)
    norm, weight, bias, head_modulation = (t.to(device, dtype) for t in wide.tensors)
    head = Head(norm, weight, bias, head_modulation, wide.excluded_token)
    masked = torch.arange(0, batch * length, 2, device=device)
    targets = torch.zeros(batch, length, dtype=torch.int64, device=device)
    weights = torch.ones(masked.shape[0], device=device)
    drawn = torch.arange(min(args.rows, batch * length), device=device)
    names = RowRng(0, *(name.to(device) for name in row_rng(drawn.shape[0])[1:]))

    def loops() -> Tensor:
        out = lk.looped_blocks(x, blocks, modulation, args.loops, num_heads=heads, rotary=rotary)
        assert isinstance(out, Tensor)
        return out

    def loss() -> Tensor:
        return lk.masked_cross_entropy(hidden, head, targets, masked, weights)[0]

    def gradients(result: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                for leaf in leaves:
                    leaf.requires_grad_()
                return torch.autograd.grad(result().sum(), leaves)
            finally:
                for leaf in leaves:
                    leaf.requires_grad_(False)

        return run

    block_leaves = [x, modulation, *(weight for block in blocks for weight in block)]
    wide_shape = f"x [{batch}, {length}, {hidden_size}], 2 blocks, S {args.loops}"
    rows = f"{masked.shape[0]} of {batch * length} rows, D {hidden_size}, V {VOCABULARY}"
    return [
        _Case("looped_blocks", wide_shape, loops),
        _Case("looped_blocks, gradients", wide_shape, gradients(loops, block_leaves)),
        _Case("masked_cross_entropy, gradients", rows, gradients(loss, [hidden, *head.tensors])),
        _Case(
            "sample_rows",
            f"{drawn.shape[0]} rows, D {hidden_size}, V {VOCABULARY}",
            lambda: lk.sample_rows(hidden, head, drawn, names),
        ),
    ]
