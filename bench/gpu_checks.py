"""What is asked of the kernels before they are timed: as compiled, at their first launch, in their tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench.gpu_times import clock_and_power
from bench.looped_blocks import applied
from bench.phases import RIGHT, ROOT, WRONG, LeftOut
from bench.probes.hopper_facts import Run
from bench.run import BF16, Call, Figures, head_in_fp8, in_fp8
from loopmdm_kernels.cuda import compiler, driver, looped_blocks, looped_blocks_backward, prepare, targets
from loopmdm_kernels.cuda.head_kernels import HEAD_KERNELS
from loopmdm_kernels.cuda.launch import known_device
from loopmdm_kernels.cuda.parameters import backward_defines
from loopmdm_kernels.schedule import BlockShape, choose_backward
from loopmdm_kernels.testing import assert_matches_oracle, reference

PACKAGES = ("torch", "triton", "cuda-bindings", "numpy", "nvidia-ml-py", "liger-kernel", "flashinfer-python")
WIDTHS = ((64, 4), (128, 4), (256, 8), (512, 8), (768, 12), (1024, 16), (1024, 8))  # hidden size, heads
LENGTHS = (1, 32, 64, 81, 128, 256, 512, 1000, 1024)
REPEATS = 200
_FORK = multiprocessing.get_context("fork")
_INTERPRETER = ExitStack()  # of a dry run, to its end


def environment(run: Run) -> Figures:
    """Which machine and versions these are."""
    figures: Figures = {"python": platform.python_version(), "nvcc": shutil.which("nvcc")}
    for name in PACKAGES:
        try:
            figures[name] = version(name)
        except PackageNotFoundError:
            figures[name] = "not installed"
    figures |= {name: str(state) for name, state in lk.available_backends().items()}
    if not run.dry:
        properties = torch.cuda.get_device_properties(0)
        figures["GPU"] = properties.name
        figures["capability"] = f"{properties.major}.{properties.minor}"
        figures["CUDA of torch"] = str(torch.version.cuda)
        figures |= {"now": dict(clock_and_power())}
        if figures["cuda"] == "True":
            limits = driver.facts(0)
            figures |= {"SMs": float(limits.sms), "persisting L2 bytes": float(limits.persisting_bytes)}
            figures["compiler"] = compiler._compiler()[0].strip().splitlines()[-1]
    return figures


class Compiled(NamedTuple):
    source: str
    macros: Mapping[str, int]
    shared_bytes: int
    threads: int


def kernels_of(limits: driver.Facts) -> dict[str, Compiled]:
    """What tests and benchmarks launch on this GPU, each once."""
    target = targets.target_of(limits.capability)
    device, hopper = target.used_of(known_device(limits)), target is targets.SM90
    found = {"prepare": Compiled(prepare.SOURCE, {}, prepare.SHARED_BYTES, prepare.THREADS)}
    for hidden, heads in WIDTHS:
        if hidden // heads not in target.head_dims:
            continue
        for length in LENGTHS if (hidden, heads) in ((128, 4), (768, 12)) else (150, 1024):
            shape = BlockShape(1, length, hidden, heads, 4 * hidden, 2)
            kernel = looped_blocks.kernel_of(shape, target, device)
            name = f"forward, {hidden} wide, {heads} heads, {length} tokens"
            found[name] = Compiled(kernel.source, dict(kernel.macros), kernel.shared_bytes, kernel.threads)
            if hopper and hidden // heads in looped_blocks_backward.HEAD_DIMS:
                back = choose_backward(shape, device)
                found[name.replace("forward", "backward")] = Compiled(
                    looped_blocks_backward.SOURCE,
                    backward_defines(shape, back),
                    back.shared_bytes,
                    target.threads,
                )
    for kernel in HEAD_KERNELS if hopper else ():
        name = ", ".join([Path(kernel.source).stem, *(f"{key} {value}" for key, value in kernel.macros)])
        found[name] = Compiled(kernel.source, dict(kernel.macros), kernel.shared_bytes, kernel.threads)
    different: dict[tuple[Any, ...], str] = {}
    for name, kernel in found.items():
        different.setdefault((kernel.source, *sorted(kernel.macros.items())), name)
    return {name: found[name] for name in different.values()}


def contract(run: Run) -> Iterator[Figures]:
    """Each kernel as this machine's compiler makes it: nothing in local memory, and its share of registers.

    Compiled side by side, and kept: no later phase waits for these.
    """
    if run.dry:
        yield {"prepare": compiler.compile_kernel(prepare.SOURCE, {}, "sm_90a") and None}
        return
    pool = _FORK.Pool(os.cpu_count())  # before this process touches the GPU
    capability = torch.cuda.get_device_capability()
    if (reason := driver.why_unavailable(capability)) is not None:
        raise LeftOut(reason)
    torch.cuda.synchronize()  # makes the context in which they are loaded
    architecture = targets.target_of(capability).architecture
    kernels = kernels_of(driver.facts(0))
    with pool:
        cubins = pool.imap(partial(_compiled, architecture=architecture), kernels.values())
        for (name, kernel), cubin in zip(kernels.items(), cubins, strict=True):
            yield {name: WRONG + cubin[:200] if isinstance(cubin, str) else as_declared(kernel, cubin)}


def _compiled(kernel: Compiled, architecture: str) -> bytes | str:
    """Or the compiler's message."""
    try:
        return compiler.compile_kernel(kernel.source, kernel.macros, architecture)
    except RuntimeError as error:
        return str(error)


def as_declared(kernel: Compiled, cubin: bytes) -> str:
    loaded = driver.Kernel(cubin, Path(kernel.source).stem, kernel.shared_bytes)
    reason = loaded.breach(kernel.threads)
    return RIGHT if reason is None else WRONG + reason


# An op with its gradients, or without: the tensors that are compared with those in float64.
Results = Callable[[Callable[..., Any], torch.dtype], list[Tensor]]


class Cases(NamedTuple):
    """Of each op, on inputs of these sizes."""

    run: Run
    batch: int
    length: int
    loops: int = 2

    def looped_blocks(self, op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        with torch.no_grad():
            return [applied(op, self.run.looped(self.batch, self.length, dtype), self.loops)]

    def gradients(self, op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = self.run.looped(self.batch, self.length, dtype, grad=True)
        out = applied(op, inputs, self.loops)
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, list(inputs.leaves().values()), grad)]

    def looped_blocks_in_fp8(self, op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = in_fp8(self.run.looped(self.batch, self.length, dtype))
        return [applied(op, inputs, self.loops, compute_dtype=dtype)]

    def masked_cross_entropy(self, op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        hidden, head = self.run.head(self.batch, self.length, dtype, grad=True)
        total, nll = op(hidden, head, *self.run.rows(self.batch, self.length))
        return [nll.detach(), *torch.autograd.grad(total, [hidden, *head[:4]])]

    def head_logits(self, op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        with torch.no_grad():
            return [op(*self.run.head(self.batch, self.length, dtype), compute_dtype=dtype)]

    def sample_rows(self, op: Callable[..., Any], dtype: torch.dtype, *, fp8: bool = False) -> list[Tensor]:
        """The statistics: a draw at temperature 0 is their argmax."""
        hidden, head = self.run.head(self.batch, self.length, dtype)
        rows = torch.arange(min(200, self.batch * self.length), device=hidden.device)
        options = {"temperature": 0.0, "compute_dtype": dtype}
        out = op(hidden, head_in_fp8(head) if fp8 else head, rows, self.run.names(len(rows)), **options)
        return [out.log_prob, out.top1_prob, out.top2_prob, out.entropy]

    def sample_rows_in_fp8(self, op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        return self.sample_rows(op, dtype, fp8=True)


OPS = {  # of the cases, where they are not their names
    "gradients": "looped_blocks",
    "looped_blocks_in_fp8": "looped_blocks",
    "sample_rows_in_fp8": "sample_rows",
}


def right(backend: str, cases: Cases, name: str) -> Figures:
    """RIGHT for each tensor that is as near to float64 as plain PyTorch's, or what is wrong with it."""
    results: Results = getattr(cases, name)
    op = OPS.get(name, name)
    with lk.use_backend(backend_of(cases.run, backend)):
        ours, again = (results(getattr(lk, op), BF16) for _ in range(2))
    baseline, oracle = (results(getattr(reference, op), dtype) for dtype in (BF16, torch.float64))
    figures: Figures = {}
    for index, (out, same, *others) in enumerate(zip(ours, again, baseline, oracle, strict=True)):
        try:
            assert_matches_oracle(out, *others)
            figures[f"{name} {index}"] = RIGHT if torch.equal(out, same) else f"{WRONG}other bits each time"
        except AssertionError as error:
            figures[f"{name} {index}"] = WRONG + str(error).splitlines()[0]
    return figures


def backend_of(run: Run, name: str) -> str:
    """In a dry run Triton is interpreted, and the reference plays CUDA."""
    return "reference" if run.dry and name == "cuda" else name


def run_of(dry: bool) -> Run:
    if dry:
        if not os.environ.get("TRITON_INTERPRET"):
            sys.exit("--dry-run needs TRITON_INTERPRET=1")
        from tests.triton.interpreted import interpreted

        _INTERPRETER.enter_context(interpreted())
    return Run(dry)


def why_no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no GPU on this machine"


def needs_hopper(run: Run) -> None:
    if not run.dry and torch.cuda.get_device_capability() != (9, 0):
        raise LeftOut("needs an H100 or H200 (compute capability 9.0)")


def first_launch(
    names: tuple[str, ...], batch: int, length: int, hidden: int, heads: int, run: Run
) -> Iterator[Figures]:
    """Small calls of CUDA kernels that have never run here, after one loop and after two."""
    if names != ("looped_blocks",):
        needs_hopper(run)
    sizes = run.sizes._replace(hidden=hidden, heads=heads)
    if run.dry:
        batch, length, sizes = 1, 4, run.sizes
    run = run._replace(other_sizes=sizes)
    for name in names:
        for loops in (1, 2) if name == "looped_blocks" else (2,):
            found = right("cuda", Cases(run, batch, length, loops), name)
            yield {f"{key}, S = {loops}": value for key, value in found.items()}


def on_triton(names: tuple[str, ...], run: Run) -> Iterator[Figures]:
    """Values and gradients at real sizes."""
    for name in names:
        yield right("triton", Cases(run, *run.sizes.checked), name)


def draws(run: Run) -> Figures:
    """Those of the reference, in fp32, by the same random numbers."""
    hidden, head = run.head(*run.sizes.checked, torch.float32)
    rows = torch.arange(min(64, hidden.shape[0] * hidden.shape[1]), device=run.device)
    with lk.use_backend("triton"):
        ours, theirs = (
            op(hidden, head, rows, run.names(len(rows))).token
            for op in (lk.sample_rows, reference.sample_rows)
        )
    differ = int((ours != theirs).sum())
    return {"draws": f"{WRONG}{differ} of {len(rows)} differ from the reference" if differ else RIGHT}


def same_bits(run: Run) -> Iterator[Figures]:
    """The same small calls again and again: a race shows as bits that move."""
    needs_hopper(run)
    batch, length = (1, 4) if run.dry else (1, 128)
    cases = Cases(run, batch, length)
    repeats = 2 if run.dry else REPEATS
    for name in ("looped_blocks", "gradients", "masked_cross_entropy", "sample_rows", "head_logits"):
        call = partial(getattr(cases, name), getattr(lk, OPS.get(name, name)), BF16)
        with lk.use_backend(backend_of(run, "cuda")):
            yield {name: moved(call, repeats)}


def moved(call: Call, repeats: int) -> str:
    first = call()
    other = sum(not all(map(torch.equal, first, call())) for _ in range(repeats - 1))
    return f"{WRONG}{other} of {repeats - 1} calls gave other bits" if other else RIGHT


def tested(run: Run, *arguments: str) -> Iterator[Figures]:
    """The tests of these files, by a pytest of its own, counted while they run."""
    if run.dry:
        yield {name: None for name in arguments if (ROOT / name).exists()}
        return
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-W", "default", *arguments]
    counts: Counter[str] = Counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line)
            if found is None:
                continue
            name, word = found.groups()
            counts[word.lower()] += 1
            failed = {name: f"{WRONG}see the log"} if word in ("FAILED", "ERROR") else {}
            yield {**failed, **{key: float(value) for key, value in counts.items()}}
    if process.returncode:
        yield {"pytest": f"{WRONG}it ended with status {process.returncode}"}


def qualified(run: Run) -> Figures:
    """`loopmdm qualify` in bf16: what calls on this machine use from now on."""
    command = [sys.executable, "-m", "loopmdm", "qualify", "--json", "--no-compiled", "--dtype", "bfloat16"]
    if run.dry:
        return {"qualify": None}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    return found_by_qualify(json.loads(done.stdout))


def found_by_qualify(verdict: Mapping[str, Any]) -> Figures:
    figures: Figures = {}
    for entry in verdict["entries"]:
        name = " ".join(entry[part] for part in ("backend", "op", "direction", "dtype"))
        figures[name] = {True: RIGHT, False: f"{WRONG}{entry['why']}", None: entry["why"]}[entry["right"]]
        if entry["speedup"] is not None:
            figures[f"{name}, times plain PyTorch"] = entry["speedup"]
    return figures
