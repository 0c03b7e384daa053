"""Sampling beside the reference's algorithm: time to as many steps, and network calls in a batch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopmdm_kernels as lk
from bench import reference_sampler
from bench.compare import OURS, best_peer, figures, measure
from bench.peers import EAGER, compiled, compiled_pieces, plain_ops
from bench.roofline import NAMES, native_dtype
from bench.run import BF16, REAL, Call, Calls, Run
from loopmdm import LoopMDM, LoopMDMConfig, sample
from loopmdm.model.flops import forward_flops
from loopmdm_kernels.graphs import captured_by
from loopmdm_kernels.testing import RecordedGraphs
from loopmdm_kernels.types import Head

LENGTH, STEPS, VOCAB = 1024, 1024, REAL.vocab_size
# Of T = L steps a share 1 - (1 - 1/T)^L = .632 reveals something in a sequence: 5 of 8, nearly. All variants
# take 8 steps and compute in 5, whatever they draw.
TIMED_STEPS, TIMED_CALLS = 8, (0, 1, 3, 4, 6)
REPEATS = 2  # of those that decide, seconds each; the others are timed once


class Enough(Exception):
    pass


def ours(model: LoopMDM, num_loops: int, dtype: torch.dtype | None = None):
    """As many steps of a run of T as compute TIMED_CALLS times; the others cost microseconds."""

    def run() -> None:
        events = []

        def stop(event: Any) -> None:
            events.append(event)
            if len(events) == len(TIMED_CALLS):
                raise Enough

        try:
            sample(model, 1, LENGTH, STEPS, plan=num_loops, on_step=stop, progress=False, dtype=dtype)
        except Enough:
            return
        raise AssertionError("the run ended early")

    return run


def theirs(model: LoopMDM, num_loops: int, functions: Any, *, compile_tail: bool):
    mask = model.config.mask_token_id
    pieces = (reference_sampler.predict, reference_sampler.update)
    predict, update = (compiled(p) for p in pieces) if compile_tail else pieces

    def update_at_any_time(tokens: Tensor, probs: Tensor, mask: int, t: float, s: float) -> Tensor:
        # The times as tensors: as numbers each step would be compiled anew.
        return update(tokens, probs, mask, torch.tensor(t), torch.tensor(s))

    def run() -> None:
        tokens = torch.full((1, LENGTH), mask)
        with plain_ops(functions), torch.no_grad():
            reference_sampler.run_steps(
                lambda ids: model(ids, num_loops=num_loops),
                tokens,
                mask,
                TIMED_STEPS,
                TIMED_CALLS,
                STEPS,
                predict,
                update_at_any_time,
            )

    return run


@pytest.mark.parametrize("num_loops", [1, 12], ids=["S1", "S12"])
def test_sampling(benchmark, num_loops):
    config = LoopMDMConfig.preset(
        "small", vocab_size=VOCAB, mask_token_id=VOCAB - 1, dropout=0.0, gate_init=1.0
    )
    torch.manual_seed(0)
    dtype = native_dtype()  # in which all are fastest
    model = LoopMDM(config).eval().to(dtype)

    def on_the_reference_backend() -> None:
        with plain_ops(EAGER), torch.no_grad(), lk.use_backend("reference"):
            ours(model, num_loops)()

    variants = {
        OURS: ours(model, num_loops),
        "ours on plain PyTorch": on_the_reference_backend,
        f"eager {NAMES[dtype]}": theirs(model, num_loops, EAGER, compile_tail=False),
        f"compiled {NAMES[dtype]}": theirs(model, num_loops, compiled_pieces(), compile_tail=True),
    }
    medians = measure(variants, few=1, repeats=REPEATS)
    peer = best_peer(medians)
    eager = medians[f"eager {NAMES[dtype]}"]
    calls = STEPS * (1 - (1 - 1 / STEPS) ** LENGTH)
    flops = len(TIMED_CALLS) * forward_flops(config, LENGTH, num_loops, "blocks")
    benchmark.extra_info.update(
        figures(medians, flops=flops, dtype=dtype),
        speedup_of_the_sampler_alone=round(eager / medians["ours on plain PyTorch"], 3),
        hours_to_1024_steps={
            name: round(medians[name] / len(TIMED_CALLS) * calls / 3600, 3) for name in (OURS, peer)
        },
    )
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


def model_on(run: Run, length: int) -> LoopMDM:
    vocab_size = run.sizes.vocab_size
    small = (
        {"hidden_size": run.sizes.hidden, "num_heads": run.sizes.heads, "num_layers": 4} if run.dry else {}
    )
    config = LoopMDMConfig.preset(
        "small", vocab_size=vocab_size, mask_token_id=vocab_size - 1, max_length=length, **small
    )
    torch.manual_seed(0)
    return LoopMDM(config).to(run.device, BF16).eval()


def our_gpu_calls(run: Run, model: LoopMDM, shape: tuple[int, int, int], order: str) -> dict[str, Call]:
    """Runs of batch, length and steps, with and without CUDA graphs."""
    ours = partial(sample, model, *shape, order=order, plan=run.sizes.loops, progress=False, seed=0)

    def graphs() -> Any:
        with captured_by(RecordedGraphs()) if run.dry else nullcontext():
            return ours(cuda_graphs=True)

    return {"ours": ours, "ours, graphs": graphs}


def gpu_calls(run: Run) -> Calls:
    """A whole sampling run, and the reference's algorithm with the compiled pieces of the same model."""
    batch, length, steps = run.sizes.sampling
    model = model_on(run, length)
    mask = model.config.mask_token_id
    functions = EAGER if run.dry else compiled_pieces()
    start = torch.full((batch, length), mask, device=run.device)

    @torch.no_grad()
    def reference_run() -> Any:
        with plain_ops(functions):
            network = partial(model, num_loops=run.sizes.loops)
            return reference_sampler.run_steps(network, start, mask, steps, None, steps)

    ours = our_gpu_calls(run, model, run.sizes.sampling, "ancestral")
    return {**ours, "reference algorithm": reference_run}


def gpu_step_calls(run: Run) -> Calls:
    """Runs of few tokens, in which a step is short."""
    _, length, _ = run.sizes.step
    return our_gpu_calls(run, model_on(run, length), run.sizes.step, "random")


class FixedPrediction(nn.Module):
    """Predicts the same everywhere, at once: who calls it how often is all that is asked."""

    compute_dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__()
        self.config = LoopMDMConfig(vocab_size, vocab_size - 1, hidden_size=2, num_heads=1, max_length=length)
        self._head = Head(
            torch.ones(2),
            torch.zeros(vocab_size, 2),
            torch.zeros(vocab_size),
            torch.zeros(1, 2, 2),
            vocab_size - 1,
        )

    def hidden(self, ids: Tensor, sigma: Tensor | None = None, *, num_loops: int) -> Tensor:
        return torch.zeros(*ids.shape, 2)

    def head(self, sigma: Tensor | None = None) -> Head:
        return self._head


def test_network_calls(benchmark, batch=16, vocab_size=32):
    """Calls of a sequence at T = L = 1024 in a batch of 16, and those of the reference's batch-wide cache."""
    model = FixedPrediction(vocab_size, LENGTH)
    result = sample(model, batch, LENGTH, STEPS, progress=False, plan=1)
    calls = result.network_calls.double()
    expected = STEPS * (1 - (1 - 1 / STEPS) ** LENGTH)
    torch.manual_seed(0)
    logits = torch.zeros(batch, LENGTH, vocab_size)
    with torch.no_grad():
        _, reference = reference_sampler.run_steps(
            lambda ids: logits,
            torch.full((batch, LENGTH), vocab_size - 1),
            vocab_size - 1,
            STEPS,
            None,
            STEPS,
        )
    deviations = float((calls.mean() - expected) / (calls.std() / math.sqrt(batch)))
    benchmark.extra_info.update(
        calls_per_sequence=round(float(calls.mean()), 1),
        expected=round(expected, 1),
        standard_errors_off=round(deviations, 2),
        reference_calls_per_sequence=reference,
        steps=STEPS,
        rows_projected_per_sequence_and_step=round(result.rows_projected / batch / STEPS, 3),
    )
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    assert abs(deviations) < 3
    assert result.rows_projected == batch * LENGTH
