"""`make gpu`: checks the kernels on a GPU and times them beside their peers, the most important first.

    python -m bench.gpu              9.4 minutes; results go to bench/results, or --out FOLDER
    python -m bench.gpu --quick      the most important six minutes of it (`make gpu-quick`)
    python -m bench.gpu --dry-run    without a GPU: every path of this script, interpreted, on tiny tensors

Status 1: a check failed or a target was missed. docs/gpu.md says what the outcomes mean.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

import loopmdm_kernels as lk
from bench import attention, gpu_checks, gpu_hopper, gpu_small, looped_blocks, sample_rows, sampling
from bench.looped_blocks import applied
from bench.phases import RIGHT, WRONG, Phase, Script, main
from bench.probes.hopper_facts import Run
from bench.run import Calls, Figures
from bench.targets import MEMORY_TARGET


def of_both(makers: tuple[Callable[..., Calls], ...], run: Run) -> Iterator[Figures]:
    """Ours by Triton beside others, at few and many tokens, in CUDA graphs."""
    with torch.no_grad(), lk.use_backend("triton"):
        for batch, length in run.sizes.forward:
            for make in makers:
                graphs, failed = run.made(
                    {name: partial(run.captured, call) for name, call in make(run, batch, length).items()}
                )
                times = {**failed, **run.times(graphs)}
                yield {f"B{batch} L{length} {name}": value for name, value in times.items()}


def fp8_blocks(run: Run, batch: int, length: int) -> Calls:
    return looped_blocks.fp8_calls(run.looped(batch, length), run.sizes.loops)


def whole_sampling(run: Run) -> Figures:
    """By the host's clock: a run takes seconds."""
    with lk.use_backend("triton"):
        return run.host_times(sampling.gpu_calls(run))


def step(run: Run) -> Figures:
    """A denoising step of few tokens, in ms; the captures of the run are part of it."""
    _, _, steps = run.sizes.step
    with lk.use_backend("triton"):
        return run.host_times(sampling.gpu_step_calls(run), 1 / steps)


def peak_memory(run: Run) -> Figures:
    """Peak memory of forward and backward with recomputation: all loops over one loop."""
    inputs = run.looped(*run.sizes.training, grad=True)
    leaves = list(inputs.leaves().values())

    def peak(num_loops: int) -> int:
        if not run.dry:
            torch.cuda.reset_peak_memory_stats(run.device)
        out = applied(lk.looped_blocks, inputs, num_loops, recompute=True)
        torch.autograd.grad(out.sum(), leaves)
        return 1 if run.dry else torch.cuda.max_memory_allocated(run.device)

    with lk.use_backend("triton"):
        peak(1)
        ratio = peak(run.sizes.loops) / peak(1)
    return {"ratio": ratio, "verdict": RIGHT if ratio <= MEMORY_TARGET else f"{WRONG}over {MEMORY_TARGET}"}


def launch_overhead(run: Run) -> Figures:
    """What the host needs for a launch outside a graph: looped_blocks of few tokens, not waited for."""
    from loopmdm_kernels.triton.launch import processor, recording

    call = partial(applied, lk.looped_blocks, run.looped(*run.sizes.forward[0]), run.sizes.loops)
    times = []
    with torch.no_grad(), lk.use_backend("triton"):
        with recording(processor(run.device)) as launches:
            call()
        for _ in range(1 + run.sizes.repeats):
            run.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    run.synchronize()
    host = statistics.median(times[1:])
    return {"launches a call": float(len(launches)), "us a launch": 1e6 * host / len(launches)}


LAUNCHES = {  # op: names of the cases, then batch, length, hidden size, heads
    "first looped_blocks": (("looped_blocks",), 1, 64, 768, 12),
    "first cluster": (("looped_blocks",), 1, 81, 128, 4),
    "first four": (("looped_blocks",), 1, 100, 768, 12),
    "first pair": (("sample_rows", "head_logits"), 2, 200, 768, 12),
    "first backward": (("gradients",), 2, 81, 768, 12),
    "first loss": (("masked_cross_entropy",), 2, 200, 768, 12),
}
ON_TRITON = {
    "triton looped_blocks": ("gradients",),
    "triton masked_cross_entropy": ("masked_cross_entropy",),
    "triton sample_rows": ("sample_rows", "head_logits"),
    "triton fp8": ("looped_blocks_in_fp8", "sample_rows_in_fp8"),
}
TESTS = {  # seconds, arguments of pytest
    "tests of the head": (60, ("tests/cuda/test_head_on_gpu.py",)),
    "tests of graphs": (120, ("tests/sampling/test_graphs_on_gpu.py",)),
    "tests in Triton": (120, ("-m", "not gpu", "tests/triton", "--ignore=tests/triton/test_dry_run.py")),
    "tests of all ops": (
        240,
        ("-m", "gpu", *(f"tests/{name}" for name in lk.backends._OPS if not name.endswith("backward"))),
    ),
}


def tests(arguments: tuple[str, ...]) -> Callable[[Run], Iterator[Figures]]:
    return lambda run: gpu_checks.tested(run, *arguments)


PHASES = {
    "environment": Phase(gpu_checks.environment, 30, quick=True),
    "contract": Phase(gpu_checks.contract, 75, quick=True),
    **{
        name: Phase(partial(gpu_checks.first_launch, *sizes), 25, quick=True)
        for name, sizes in LAUNCHES.items()
    },
    "same bits": Phase(gpu_checks.same_bits, 30, quick=True),
    "tests of looped_blocks": Phase(tests(("tests/cuda/test_on_gpu.py", "-k", "own", "-x")), 75, quick=True),
    **{name: phase for name, phase in gpu_hopper.PHASES.items() if phase.quick},
    **{name: Phase(partial(gpu_checks.on_triton, names), 40) for name, names in ON_TRITON.items()},
    "triton draws": Phase(gpu_checks.draws, 30),
    "tests of the head": Phase(tests(TESTS["tests of the head"][1]), 60),
    **{name: phase for name, phase in gpu_hopper.PHASES.items() if name != "environment"},
    "qualify": Phase(gpu_checks.qualified, 150),
    "attention": Phase(partial(of_both, (attention.gpu_calls,)), 40),
    "fp8": Phase(partial(of_both, (fp8_blocks, sample_rows.fp8_calls)), 60),
    "launch overhead": Phase(launch_overhead, 20),
    "denoising step": Phase(step, 60),
    "sampling": Phase(whole_sampling, 120),
    "peak memory": Phase(peak_memory, 30),
    **{f"memcheck {name}": Phase(partial(gpu_small.memcheck, name), 60) for name in gpu_small.CALLS},
    **{name: Phase(tests(arguments), seconds) for name, (seconds, arguments) in TESTS.items()},
}


if __name__ == "__main__":
    sys.exit(
        main(
            Script(
                "gpu", PHASES, gpu_checks.run_of, gpu_checks.why_no_gpu, gpu_hopper.conclude, gpu_hopper.keep
            ),
            __doc__,
        )
    )
