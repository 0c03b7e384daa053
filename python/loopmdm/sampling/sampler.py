"""`sample`: the public entry. It makes the order, the network and the run, and drives the run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from loopmdm.plan import ComputePlan
from loopmdm.sampling.canvas import make_canvas, make_sequence_ids
from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.fused import FusedRun
from loopmdm.sampling.graphs import GraphNetwork
from loopmdm.sampling.network import Network, checked_config, sampled
from loopmdm.sampling.orders import Order, Slots, make_order
from loopmdm.sampling.progress import progress_bar
from loopmdm.sampling.reference_numerics import ReferenceRun
from loopmdm.sampling.remasking import Remasked, Remasking
from loopmdm.sampling.result import SampleResult, StepEvent
from loopmdm.sampling.run import Run
from loopmdm.sampling.shaped import ShapedRun
from loopmdm_kernels.backends import recorded


def sample(
    model: Any,
    num_samples: int | None = None,
    length: int | Sequence[int] | None = None,
    steps: int | None = None,
    order: str = "ancestral",
    plan: int | str | os.PathLike[str] | ComputePlan | None = None,
    prompt: Any = None,
    infill: Any = None,
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_p: float | Sequence[float] | Tensor = 1.0,
    seed: int = 0,
    on_step: Callable[[StepEvent], object] | None = None,
    progress: bool = True,
    *,
    tokens_per_step: int | None = None,
    threshold: float | None = None,
    entropy_bound: float | None = None,
    counts: str = "even",
    block_length: int | None = None,
    window: int | None = None,
    remask: str | Remasking | None = None,
    top_k: int | Sequence[int] | Tensor | None = None,
    min_p: float | Sequence[float] | Tensor = 0.0,
    forbidden: Sequence[int] | Tensor | None = None,
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    cfg_scale: float = 0.0,
    eos_token_id: int | None = None,
    min_new_tokens: int | None = None,
    reference_numerics: bool = False,
    history: bool = False,
    sequence_ids: Tensor | list[int] | None = None,
    max_batch: int | None = None,
    skip_unchanged: bool = True,
    dtype: torch.dtype | None = None,
    cuda_graphs: bool = False,
) -> SampleResult:
    """Sample token sequences from a masked diffusion model.

    Random numbers are named by (seed, sequence id, step, position), so a sequence does not depend on the
    batch it is sampled in, nor on max_batch and skip_unchanged. The model is left as it was; an autocast
    context of the caller applies.

    Of steps, tokens_per_step, threshold and entropy_bound at most one is given: they say how many positions a
    step reveals. The default is one, and for "ancestral" the reverse process with T = its length for each
    sequence.

    Args:
        model: a `LoopMDM`.
        num_samples: B; default as many as length, prompt or infill give, else 8.
        length: L of all sequences or of each; default the length of infill, else the model's max_length. A
            length beyond max_length needs block_length: the network then reads the max_length positions that
            end with the block.
        steps: T denoising steps; what the plan covers, if nothing else is given.
        order: which masked positions are revealed first.
            "ancestral": the model's reverse process on T steps (MDLM), exact.
            "first_hitting": the same in continuous time, one network call a position (2409.02908), exact.
            "confidence", "margin", "entropy": the most probable prediction, the one furthest ahead of the
            second, the least uncertain. They predict every masked position.
            "random", "left_to_right".
        plan: loops per step: None = the model's max_loops, a loop count, a `ComputePlan`, the text of a
            schedule of loop counts ("S2:125,S12:875"), or the path of a saved plan. Where steps have no fixed
            place in the denoising (first_hitting, threshold, entropy_bound), a plan of n steps is read at
            n (1 - t), t the time or the share of masks left, for each sequence.
        prompt: token ids every sequence starts with: [P], [B, P], or a list of B token lists of any lengths.
        infill: [L], [B, L] or a list of B token lists that hold the mask token at the positions to fill; all
            others stay as they are. A prompt given too must agree with it.
        temperature: divides the logits before the draw; 0 takes the most probable token. It, top_p, top_k
            and min_p are one value, or one for each sequence [B].
        top_p: draw from the most probable tokens that together reach this probability, in (0, 1].
        seed: 0 <= seed < 2^63.
        on_step: called with a `StepEvent` after every step that changed something; what it raises ends the
            run.
        progress: show a progress bar when standard error is a terminal.
        tokens_per_step: reveal so many positions a step ("Top-k"). first_hitting is inexact beyond 1.
        threshold: reveal what the order rates at least so high: probability ("confidence"; for "random" and
            "left_to_right", up to the first position that misses it), lead ("margin"), or at most so many
            nats ("entropy"). At least one position.
        entropy_bound: reveal the best rated positions while the sum of their entropies, less the largest,
            stays within so many nats. At least one.
        counts: how many positions each of the steps reveals where they do not divide evenly. "even": the
            larger counts are spread over the steps; "llada": the first steps have them, and every block takes
            the same number of steps, as in LLaDA's sampler (docs/laws.md). Not for ancestral, first_hitting.
        block_length: fill blocks of so many positions one after the other (semi-autoregressive), counted from
            a sequence's first mask. steps are shared among the blocks.
        window: reveal among the so many leftmost masks only.
        remask: "cap", "rescale", "conf", "loop" or a `Remasking`: revealed tokens are masked again at times
            (ReMDM, arXiv 2503.00307). With the order "ancestral".
        top_k: draw from the so many most probable tokens (before top_p).
        min_p: draw from tokens at least so many times as probable as the most probable one, at the
            temperature; in [0, 1).
        forbidden: token ids that are never drawn; probabilities are those without them.
        logits_processor: called with the tokens that the network read [R, L], one row for each row of logits,
            and these, [R, V] in fp32; returns the logits to draw from. As of transformers, on predicted rows.
        cfg_scale: classifier-free guidance: logits are u + (cfg_scale + 1) (l - u), l those of the sequence
            and u those with its given tokens masked (LLaDA). Each call is two.
        eos_token_id: ends a sequence when drawn: positions behind it are not computed, and hold it at last.
        min_new_tokens: eos_token_id is not drawn at the so many first positions that a sequence fills.
        reference_numerics: draw as the reference does (`ddpm_cache`): an fp32 race against the mask in every
            step, which cuts off rare tokens, and the most probable token where masks are left. Slow, and only
            for comparison with figures made so. Same seed, same tokens on a CPU.
        history: keep all step events in the result.
        sequence_ids: [B] ids that name the sequences' random numbers; default 0..B - 1.
        max_batch: at most this many sequences in one forward pass.
        skip_unchanged: False runs the network on every sequence at every step, which changes the cost alone.
        dtype: torch.bfloat16 runs the matrix products in bf16 by autocast; None leaves autocast as it is.
        cuda_graphs: launch each network call as one CUDA graph, to the same tokens; for short sequences and
            small batches, where launches take longer than their kernels. Needs a GPU and the triton or
            the cuda backend, or both; no exit rules but the plain hidden change. Experimental.

    Raises:
        ValueError, TypeError: on arguments out of range or at odds with each other, and on predictions that
            are not finite (NaN in weights).
    """
    arguments = locals()
    decoding = Decoding(**{field.name: arguments.pop(field.name) for field in fields(Decoding)})
    return sample_with(decoding=decoding, **arguments)


def sample_with(
    model: Any,
    decoding: Decoding,
    num_samples: int | None = None,
    length: int | Sequence[int] | None = None,
    prompt: Any = None,
    infill: Any = None,
    *,
    sequence_ids: Tensor | list[int] | None = None,
    on_step: Callable[[StepEvent], object] | None = None,
    history: bool = False,
    progress: bool = True,
) -> SampleResult:
    """`sample` with all options of decoding in one value."""
    config = checked_config(model)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be a function or None, got {type(on_step).__name__}")
    decoding.check_for(config)
    canvas = make_canvas(config, num_samples, length, prompt, infill, decoding.block_length)
    batch, longest = canvas.tokens.shape
    decoding.check_batch(batch)
    ids = make_sequence_ids(sequence_ids, batch)
    slots = Slots(canvas.tokens, config.mask_token_id, ids, decoding.block_length, canvas.lengths)
    order = _make_order(slots, decoding)
    make_network = GraphNetwork if decoding.cuda_graphs else Network
    network = make_network(model, decoding, batch=batch, context=min(longest, config.max_length))
    make_run: type[Run] = ShapedRun if decoding.shapes_rows else FusedRun
    make_run = ReferenceRun if decoding.reference_numerics else make_run
    run = make_run(canvas, order, network, decoding)

    watched, most = history or on_step is not None, run.num_steps if on_step is None else 1
    events: list[StepEvent] = []
    taken = 0
    start = time.perf_counter()
    dtype = decoding.dtype
    cast = torch.autocast(model.device.type, dtype) if dtype is not None else nullcontext()
    with (
        sampled(network.models),
        cast,
        recorded() as backends,
        progress_bar(progress, run.num_steps) as advance,
    ):
        while taken < run.num_steps and not run.finished:
            steps, new = run.advance(taken, most, watched)
            taken += steps
            for event in new:
                if history:
                    events.append(event)
                if on_step is not None:
                    on_step(event)
            advance(steps)
    run.fill_behind_ends()
    return SampleResult(
        tokens=run.tokens.to(model.device),
        lengths=run.lengths.to(model.device),
        network_calls=run.network_calls.to(model.device),
        loops=run.loops.to(model.device),
        rows_projected=run.ledger.rows_projected,
        num_steps=taken if decoding.pace.adaptive else order.num_steps,
        exact=order.exact and decoding.draws_from_the_model,
        plan=decoding.plan,
        seconds=time.perf_counter() - start,
        ledger=run.ledger,
        history=events if history else None,
        backends=backends,
    )


def _make_order(slots: Slots, decoding: Decoding) -> Order:
    """The order, at a pace that fits the plan."""
    pace, seed = decoding.pace, decoding.seed
    order: Order
    if decoding.remask is not None:
        order = Remasked(slots, pace.steps, seed, decoding.remask)
    else:
        order = make_order(decoding.order, slots, pace, seed)
    if not order.timed:
        for number in sorted(set(order.steps[slots.counts > 0].tolist())):
            decoding.plan.check_steps(number)
    return order
