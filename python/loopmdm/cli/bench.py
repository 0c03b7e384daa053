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
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk
from loopmdm.cli.output import print_json, print_table, writable
from loopmdm.cli.parser import add_json, add_runtime, set_up
from loopmdm.model.config import PRESETS
from loopmdm.runs.options import UsageError, num_loops, positive_int
from loopmdm.runs.provenance import provenance
from loopmdm.speed import cases, compare, measure, page
from loopmdm.terminal import note
from loopmdm_kernels.files import write_file

EPILOG = """examples:
  loopmdm bench
  loopmdm bench --dtype bfloat16 --loops 12 --length 1024
  loopmdm bench --repeats 9 --html report.html
  loopmdm bench --json > old.json;  loopmdm bench --compare old.json
  loopmdm bench --tune tiles.json
"""
_TUNED = {"batches": ((16, 1024), (1, 1024), (1, 128)), "rows": 64}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = sorted(name for name, fields in PRESETS.items() if "vocab_size" not in fields)
    parser.add_argument("--preset", choices=sizes, default="small", help="sizes of the model (default small)")
    parser.add_argument("--tune", type=Path, metavar="TABLE.json", help="tune the Triton kernels instead")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="B", help="sequences (default 1)")
    parser.add_argument("--length", type=positive_int, default=256, metavar="L", help="tokens of each (256)")
    parser.add_argument("--loops", type=num_loops, default=4, metavar="S", help="loops of two blocks (4)")
    parser.add_argument("--rows", type=positive_int, default=64, metavar="R", help="rows drawn at once (64)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of parameters and products")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="medians of N (5)")
    parser.add_argument(
        "--backend", choices=("cpu", "triton"), help="whose kernels (default: cpu, or triton on a GPU)"
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page of figures and charts too (compiled PyTorch, more sizes: takes minutes)",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="say what moved since a run whose --json this is"
    )
    add_json(parser, "the figures")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    device = set_up(args)
    if args.tune is not None:
        return _tune(args, device)
    backend = args.backend or ("triton" if device.type == "cuda" else "cpu")
    document = {name: getattr(args, name) for name in ("preset", "batch", "length", "loops", "rows", "dtype")}
    document |= {"device": str(device), "threads": torch.get_num_threads(), "backend": backend}
    old = _old(args, document)
    if args.html is not None:
        writable("--html", args.html)
        if args.html.is_file() and args.html.stat().st_size and not page.is_page(args.html):
            raise UsageError(
                f"--html: {args.html} is a file that this option did not write; choose another name"
            )
    machine = _machine(backend, device)
    note(f"{machine}; {args.preset}, {args.dtype}, {args.repeats} turns of each after one to warm up")
    document |= _measured(args, device, backend)
    if args.html is not None:
        write_file(args.html, page.page(document))
        note(f"{args.html}: written")
    changes = [] if old is None else compare.moved(old, document)
    if args.json:
        moved = {} if old is None else {"moved": {one.name: one.verdict for one in changes}}
        print_json(document | moved)
        return 0
    peak = document["peak_gflops"]
    print(machine + ("" if peak is None else f", peak {peak:.0f} GFLOP/s in {args.dtype}"))
    print_table(
        ("", "shape", f"{backend}, ms", "spread", "PyTorch, ms", "spread", "ratio", "GFLOP/s", "of peak"),
        [_row(name, figure, backend) for name, figure in document["figures"].items()],
    )
    if old is not None:
        print()
        print_table(
            ("", "ms then", "ms now", "speed-up then", "speed-up now", "speed-up moved", "PyTorch moved"),
            [_change(one) for one in changes],
        )
    return 0


def _old(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The run to compare with; refused before the work where it was another kind of run."""
    if args.compare is None:
        return None
    old = compare.read(args.compare)
    differing = compare.differing(old, settings)
    if differing:
        raise UsageError(f"--compare: {args.compare} is of another run: {'; '.join(differing)}")
    return old


def _measured(args: argparse.Namespace, device: torch.device, backend: str) -> dict[str, Any]:
    """The figures; with --html all that its page shows."""
    fields = PRESETS[args.preset]
    sizes = cases.Sizes(
        fields["hidden_size"], fields["num_heads"], args.batch, args.length, args.loops, args.rows,
        _DTYPES[args.dtype],
    )  # fmt: skip
    own = cases.cases(sizes, device)
    peers: dict[str, dict[str, measure.Call]] = {}
    missing: dict[str, str] = {}
    if args.html is not None:
        narrow = sizes.dtype != torch.float32
        wide = cases.cases(sizes._replace(dtype=torch.float32), device) if narrow else []
        peers, missing = measure.peers_of(own, wide, note)
    peak = measure.Peak(backend, device, sizes.dtype)
    figures: dict[str, Any] = {}
    for case in own:
        note(f"  {case.name}: {case.shape} ...")
        peak.measure()
        figure = measure.figure(case, backend, args.repeats, peers.get(case.name))
        figures[case.name] = {"shape": case.shape, **figure}
    more: dict[str, Any] = {}
    if args.html is not None:
        more = {
            "series": measure.series(sizes, device, backend, args.repeats, note),
            "memory": measure.memory(sizes, device, backend, note),
            "errors": measure.errors(backend, device, sizes.dtype, note),
            "read_gb_s": measure.read_bandwidth(device),
            "missing": missing,
        }
    peak.measure()
    for figure in figures.values():
        rate = figure["gflops"][backend]
        figure["share_of_peak"] = None if peak.gflops is None else round(rate / peak.gflops, 3)
    about = {"peak_gflops": peak.gflops, "repeats": args.repeats, "provenance": provenance()}
    return {**about, "figures": figures, **more}


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


def _change(one: compare.Moved) -> tuple[str, ...]:
    speedups = (
        f"{median:.2f} [{low:.2f}, {high:.2f}]" for median, low, high in (one.old_speedup, one.new_speedup)
    )
    machine = "yes" if one.machine else "no"
    return one.name, f"{one.old_ms:.1f}", f"{one.new_ms:.1f}", *speedups, one.verdict, machine


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
    workload = tuning.Workload(fields["hidden_size"], fields["num_heads"], cases.VOCABULARY, **_TUNED)
    with torch.no_grad():
        table = tuning.tune(args.tune, workload, device, report=note)
    note(f"{args.tune}: {len(table)} entries; LOOPMDM_TRITON_TILES={args.tune} puts them to use")
    return 0
