"""What decides about the Hopper kernels, measured on a GPU: seven facts, then the kernel beside its peers.

    python -m bench.gpu_hopper              on an H100 or H200: writes bench/results/DATE-gpu-hopper.json
    python -m bench.gpu_hopper --dry-run    without one: compiles the probes, times nothing

Each measurement is a function of `dry` that returns figures by name; None stands where a GPU would have
answered. Programmatic dependent launch is not among them: a single kernel has nothing to launch early.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import loopmdm_kernels as lk
from bench.gpu import captured, compiled
from bench.report import write
from loopmdm_kernels import reference
from loopmdm_kernels.cuda import compiler, driver, targets
from loopmdm_kernels.schedule import BlockShape, choose
from loopmdm_kernels.testing import LoopedInputs, interleaved_medians, looped_inputs

RESULTS = Path(__file__).parent / "results"
PROBES = Path(__file__).parent / "hopper_probes.cu"
SMALL = BlockShape(batch=1, length=1024, hidden=768, heads=12, mlp=3072, layers=2)
WEIGHT_BYTES = 2 * SMALL.layers * SMALL.hidden * (4 * SMALL.hidden + 2 * SMALL.mlp)
TOKENS = (32, 128, 512, 1024)
# Speed over the best of torch, by number of tokens; share of the modelled limit; DRAM bytes of S 24 over S 1.
TARGETS = {32: 2.0, 128: 2.0, 512: 1.5, 1024: 1.25}
LIMIT_SHARES = {128: 0.6, 1024: 0.7}
DRAM_RATIO = 1.1
ROUNDS = 1000
Figures = dict[str, float | None]


class Arguments(ctypes.Structure):
    _fields_ = (
        ("counters", ctypes.c_void_p),
        ("buffer", ctypes.c_void_p),
        ("sink", ctypes.c_void_p),
        ("vectors", ctypes.c_int64),
        ("rounds", ctypes.c_int32),
    )


def probe(name: str, *, dry: bool, shared_bytes: int = 0) -> driver.Kernel | None:
    cubin = compiler.with_nvrtc(PROBES, ["-std=c++17"], targets.SM90.architecture)
    return None if dry else driver.Kernel(cubin, name, shared_bytes)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def barriers(dry: bool) -> Figures:
    """Microseconds for all blocks to meet: at one counter, at counters of rows, in clusters."""
    figures: Figures = {}
    for name in ("meet_at_one_counter", "meet_at_row_counters"):
        kernel = probe(name, dry=dry)
        figures[name] = None if kernel is None else _per_round(kernel, driver.facts(0).sms, 1)
    for size in (2, 4, 8):
        kernel = probe("meet_in_cluster", dry=dry)
        figures[f"cluster of {size}"] = None if kernel is None else _per_round(kernel, size * 8, size)
    return figures


def _per_round(kernel: driver.Kernel, blocks: int, cluster: int) -> float:
    counters = torch.zeros(32 * blocks, dtype=torch.int32, device="cuda")

    def call() -> None:
        counters.zero_()
        arguments = Arguments(counters=counters.data_ptr(), rounds=ROUNDS)
        kernel.launch(blocks, 128, _stream(), arguments, cluster=cluster)

    return 1e6 * interleaved_medians({"": call})[""] / ROUNDS


def clusters(dry: bool) -> Figures:
    """Clusters of 200 KB blocks that fit the device; bytes of L2 that can be kept."""
    kernel = probe("do_nothing", dry=dry, shared_bytes=200 * 1024)
    names = [f"clusters of {size}" for size in (2, 4, 8)]
    if kernel is None:
        return dict.fromkeys([*names, "persisting L2 bytes", "SMs"])
    figures: Figures = {
        name: float(kernel.active_clusters(size, 128)) for name, size in zip(names, (2, 4, 8), strict=True)
    }
    limits = driver.facts(0)
    return {**figures, "persisting L2 bytes": limits.persisting_bytes, "SMs": limits.sms}


def l2_reads(dry: bool) -> Figures:
    """Bytes a second when every SM reads all looped weights, without and with a window that keeps them."""
    kernel = probe("read_all", dry=dry)
    if kernel is None:
        return {"plain": None, "kept": None}
    buffer = torch.randn(WEIGHT_BYTES // 4, device="cuda")
    sink = torch.zeros(1, device="cuda")
    limits = driver.facts(0)
    arguments = Arguments(
        buffer=buffer.data_ptr(), sink=sink.data_ptr(), vectors=WEIGHT_BYTES // 16, rounds=20
    )
    windows = {"plain": None, "kept": driver.l2_window(buffer.data_ptr(), WEIGHT_BYTES, limits)}
    driver.set_aside_l2(0)
    loaded = kernel

    def calling(window: driver.L2Window | None) -> Callable[[], None]:
        return lambda: loaded.launch(limits.sms, 1024, _stream(), arguments, window)

    times = interleaved_medians({name: calling(window) for name, window in windows.items()})
    driver.release_l2(0)
    return {name: 20 * limits.sms * WEIGHT_BYTES / seconds for name, seconds in times.items()}


def attention_peers(dry: bool) -> Figures:
    """Seconds of torch's attention, 8 sequences of 1024 tokens, by implementation."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, size = ("cpu", 16) if dry else ("cuda", 1024)
    q, k, v = (torch.randn(8, 12, size, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def attend(kind: SDPBackend) -> None:
        with sdpa_kernel(kind):
            F.scaled_dot_product_attention(q, k, v)

    if dry:
        attend(SDPBackend.MATH)
        return dict.fromkeys(kinds)
    return dict(interleaved_medians({name: (lambda kind=kind: attend(kind)) for name, kind in kinds.items()}))


def products(dry: bool) -> Figures:
    """Seconds of cuBLAS for the four matrices at 1024 tokens: what the phases' tiles have to reach."""
    shapes = {"qkv": (768, 2304), "attn_out": (768, 768), "mlp_in": (768, 3072), "mlp_out": (3072, 768)}
    if dry:
        return dict.fromkeys(shapes)
    calls = {}
    for name, (inner, width) in shapes.items():
        left = torch.randn(1024, inner, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(width, inner, device="cuda", dtype=torch.bfloat16)
        calls[name] = lambda left=left, right=right: F.linear(left, right)
    return dict(interleaved_medians(calls))


def gaps(dry: bool) -> Figures:
    """Microseconds from one empty kernel to the next in a CUDA graph."""
    kernel = probe("do_nothing", dry=dry)
    if kernel is None:
        return {"in a graph": None}
    loaded, arguments = kernel, Arguments()

    def chain() -> None:
        for _ in range(100):
            loaded.launch(132, 128, _stream(), arguments)

    return {"in a graph": 1e6 * interleaved_medians({"": captured(chain, dry=False)})[""] / 100}


def inputs_of(tokens: int, *, dry: bool) -> LoopedInputs:
    hidden, heads = (SMALL.hidden, SMALL.heads) if not dry else (64, 1)
    inputs = looped_inputs(1, tokens if not dry else 4, hidden, heads, SMALL.layers).to(torch.bfloat16)
    return _on("cpu" if dry else "cuda", inputs)


def _on(device: str, inputs: LoopedInputs) -> LoopedInputs:
    return inputs._replace(
        x=inputs.x.to(device),
        modulation=inputs.modulation.to(device),
        blocks=[type(block)(*(tensor.to(device) for tensor in block)) for block in inputs.blocks],
        rotary=inputs.rotary and type(inputs.rotary)(*(angle.to(device) for angle in inputs.rotary)),
    )


def applying(op: Callable[..., Any], inputs: LoopedInputs, loops: int) -> Callable[[], Any]:
    return lambda: op(
        inputs.x, inputs.blocks, inputs.modulation, loops, num_heads=inputs.num_heads, rotary=inputs.rotary
    )


def looped_blocks(dry: bool) -> Figures:
    """Seconds of 12 loops beside torch.compile and Triton, both in CUDA graphs; the modelled limit."""
    figures: Figures = {}
    for tokens in TOKENS:
        inputs = inputs_of(tokens, dry=dry)
        peer = applying(compiled(reference.looped_blocks, dry=dry), inputs, 12)
        limit = 12 * choose(SMALL._replace(length=tokens)).limit_seconds
        times: dict[str, float | None] = dict.fromkeys(("cuda", "triton", "torch.compile"))
        with torch.no_grad():
            if dry:
                peer()
            else:
                calls = {"torch.compile": captured(peer, dry=False)}
                for backend in ("triton", "cuda"):
                    with lk.use_backend(backend):
                        calls[backend] = captured(applying(lk.looped_blocks, inputs, 12), dry=False)
                times.update(interleaved_medians(calls))
        figures[f"T{tokens} limit"] = limit
        figures.update({f"T{tokens} {name}": seconds for name, seconds in times.items()})
    return figures


def dram_bytes(dry: bool) -> Figures:
    """Bytes read from DRAM by one call with S = 1 and S = 24, by Nsight Compute where it is installed."""
    figures: Figures = {}
    for loops in (1, 24):
        command = [
            "ncu", "--metrics", "dram__bytes_read.sum", "--csv", "--kernel-name", "looped_blocks_sm90",
            sys.executable, "-m", "bench.gpu_hopper", "--once", str(loops),
        ]  # fmt: skip
        name = f"S{loops}"
        if dry or shutil.which("ncu") is None:
            figures[name] = None
            continue
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        figures[name] = float(out.strip().splitlines()[-1].split('","')[-1].strip('"').replace(",", ""))
    return figures


def sanitizers(dry: bool) -> Figures:
    """Exit status of two loops under each tool of compute-sanitizer: 0 is clean."""
    figures: Figures = {}
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += [sys.executable, "-m", "bench.gpu_hopper", "--once", "2"]
        if dry or shutil.which("compute-sanitizer") is None:
            figures[tool] = None
        else:
            figures[tool] = float(subprocess.run(command, timeout=120, check=False).returncode)
    return figures


def once(loops: int) -> None:
    """One call of the kernel, for a profiler or a sanitizer."""
    inputs = inputs_of(128, dry=False)
    with torch.no_grad(), lk.use_backend("cuda"):
        applying(lk.looped_blocks, inputs, loops)()
    torch.cuda.synchronize()


MEASUREMENTS = {
    "barriers": barriers,
    "clusters": clusters,
    "l2_reads": l2_reads,
    "attention_peers": attention_peers,
    "products": products,
    "gaps": gaps,
    "looped_blocks": looped_blocks,
    "dram_bytes": dram_bytes,
    "sanitizers": sanitizers,
}


def verdicts(figures: dict[str, Figures]) -> dict[str, bool | None]:
    """Whether each target is met; None where a figure is missing."""
    times, dram = figures["looped_blocks"], figures["dram_bytes"]

    def at_least(numerator: float | None, denominator: float | None, target: float) -> bool | None:
        return None if not numerator or not denominator else numerator / denominator >= target

    result = {
        f"T{tokens}: {target} times torch.compile": at_least(
            times[f"T{tokens} torch.compile"], times[f"T{tokens} cuda"], target
        )
        for tokens, target in TARGETS.items()
    }
    for tokens in TOKENS:
        result[f"T{tokens}: no slower than Triton"] = at_least(
            times[f"T{tokens} triton"], times[f"T{tokens} cuda"], 1.0
        )
    for tokens, share in LIMIT_SHARES.items():
        result[f"T{tokens}: {share} of the limit"] = at_least(
            times[f"T{tokens} limit"], times[f"T{tokens} cuda"], share
        )
    result["DRAM bytes do not grow with S"] = at_least(dram["S1"], dram["S24"], 1 / DRAM_RATIO)
    return result


def measure(*, dry: bool) -> dict[str, Any]:
    if not dry:
        torch.cuda.synchronize()  # makes the context in which the probes are loaded
    figures = {name: measurement(dry) for name, measurement in MEASUREMENTS.items()}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": "none: dry run" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "figures": figures,
        "targets": verdicts(figures),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what decides about the Hopper kernels.")
    parser.add_argument("--dry-run", action="store_true", help="prepare everything, time nothing")
    parser.add_argument("--once", type=int, metavar="S", help="one call with S loops, for a profiler")
    options = parser.parse_args()
    if options.once:
        once(options.once)
        return 0
    result = measure(dry=options.dry_run)
    text = json.dumps(result, indent=2) + "\n"
    if options.dry_run:
        print(text)
        return 0
    write(result, RESULTS / f"{result['date']}-gpu-hopper.json")
    print(text)
    return int(False in result["targets"].values())


if __name__ == "__main__":
    sys.exit(main())
