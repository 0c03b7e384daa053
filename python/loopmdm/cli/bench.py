"""Time the kernels on this machine beside plain PyTorch, or tune the Triton kernels for its GPU.

Times `looped_blocks`, `masked_cross_entropy` and `sample_rows` at the sizes of a preset, ours and the PyTorch
reference in turns. With --tune nothing is compared: tile sizes of the Triton kernels are timed, and the best
go to a table that LOOPMDM_TRITON_TILES=TABLE.json puts to use. The file is written after each kernel and
shape; the same command goes on where an interrupted one was.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm.cli.output import note, print_json, print_table
from loopmdm.cli.parser import UsageError, add_json, add_runtime, positive_int, set_up
from loopmdm.config import PRESETS
from loopmdm_kernels.testing import head_inputs, interleaved_medians, looped_inputs, row_rng
from loopmdm_kernels.types import BlockWeights, Head, Rotary, RowRng

EPILOG = """examples:
  loopmdm bench
  loopmdm bench --dtype bfloat16 --loops 12 --length 1024
  loopmdm bench --tune tiles.json
"""
VOCABULARY = 50_258
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
    figures: dict[str, Any] = {}
    for name, call in _calls(args, device).items():
        medians = interleaved_medians(
            {which: _with(which, call) for which in (backend, "reference")}, repeats=args.repeats, warmup=1
        )
        figures[name] = {
            "ms": {which: round(1000 * value, 3) for which, value in medians.items()},
            "ratio": round(medians["reference"] / medians[backend], 2),
        }
    if args.json:
        sizes = {
            name: getattr(args, name) for name in ("preset", "batch", "length", "loops", "rows", "dtype")
        }
        print_json({**sizes, "device": str(device), "threads": torch.get_num_threads(), "figures": figures})
        return 0
    print_table(
        ("", f"{backend}, ms", "PyTorch, ms", "ratio"),
        [
            (name, f"{f['ms'][backend]:.1f}", f"{f['ms']['reference']:.1f}", f"{f['ratio']:.2f}")
            for name, f in figures.items()
        ],
    )
    return 0


def _tune(args: argparse.Namespace, device: torch.device) -> int:
    reason = lk.available_backends()["triton"]
    if reason is not True:
        raise RuntimeError(f"--tune needs a GPU and Triton: {reason}")
    if args.json:
        raise UsageError("--json: --tune prints no figures, its table is a JSON file")
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


def _calls(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; no name says more than the sizes do."""
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
    return {
        "looped_blocks": loops,
        "looped_blocks, gradients": gradients(loops, block_leaves),
        "masked_cross_entropy, gradients": gradients(loss, [hidden, *head.tensors]),
        "sample_rows": lambda: lk.sample_rows(hidden, head, drawn, names),
    }
