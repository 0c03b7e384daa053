"""Inputs of looped_blocks, and what its values and gradients are compared with."""

from __future__ import annotations

import itertools

import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import LoopedInputs, assert_matches_oracle, looped_inputs, reference
from loopmdm_kernels.types import BlockWeights
from tests.near import assert_near

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def case(backend, *sizes, **options) -> LoopedInputs:
    """`looped_inputs` on the backend's device."""
    return looped_inputs(*sizes, **options).to(torch.float64, device=backend.device)


def part_of(inputs: LoopedInputs, index: slice) -> LoopedInputs:
    """Some of the sequences."""
    modulation = inputs.modulation if inputs.modulation.shape[1] == 1 else inputs.modulation[:, index]
    mask = None if inputs.key_mask is None else inputs.key_mask[index]
    return inputs._replace(x=inputs.x[index], modulation=modulation, key_mask=mask)


def call(inputs: LoopedInputs, num_loops, op=lk.looped_blocks, **options):
    shared = {"num_heads": inputs.num_heads, "rotary": inputs.rotary, "key_mask": inputs.key_mask}
    return op(inputs.x, inputs.blocks, inputs.modulation, num_loops, **{**shared, **options})


@torch.no_grad()
def run(inputs: LoopedInputs, num_loops, op=lk.looped_blocks, **options):
    """The result without gradients."""
    return call(inputs, num_loops, op, **options)


def gradients(inputs: LoopedInputs, num_loops, op=lk.looped_blocks, **options):
    """Of x, each weight and the modulation, for a fixed gradient of the result."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.leaves().items()}
    x, modulation, *weights = leaves.values()
    size = len(BlockWeights._fields)
    blocks = [BlockWeights(*weights[i : i + size]) for i in range(0, len(weights), size)]
    out = call(inputs._replace(x=x, modulation=modulation, blocks=blocks), num_loops, op, **options)
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def check(inputs: LoopedInputs, num_loops, dtype, *, weights=None, **options):
    """Compares with float64; `weights`: their dtype if not that of the computation."""
    rounded = inputs.to(weights or dtype)
    exact = run(inputs.to(torch.float64), num_loops, reference.looped_blocks, **options)
    baseline = run(rounded, num_loops, reference.looped_blocks, compute_dtype=dtype, **options)
    out = run(rounded, num_loops, compute_dtype=dtype, **options)
    if "exit_threshold" in options:
        assert out[1].dtype == torch.int64 and out[1].tolist() == exact[1].tolist()
        out, baseline, exact = out[0], baseline[0], exact[0]
    assert out.dtype == FLOAT
    assert_matches_oracle(out, baseline, exact)
    assert_near(out, exact, dtype)


def check_gradients(inputs: LoopedInputs, num_loops, dtype, *, weights=FLOAT, recompute=False, **options):
    """Of parameters in `weights`, with products in `dtype`."""
    rounded = inputs.to(weights)
    exact = gradients(inputs.to(torch.float64), num_loops, reference.looped_blocks, **options)
    options["compute_dtype"] = dtype
    baseline = gradients(rounded, num_loops, reference.looped_blocks, **options)
    for name, grad in gradients(rounded, num_loops, recompute=recompute, **options).items():
        assert grad.dtype == (FLOAT if name == "x" else weights)
        assert_matches_oracle(grad, baseline[name], exact[name], name=name)
        assert_near(grad, exact[name], dtype, name)


def shrinking(backend, batch, length, *sizes) -> LoopedInputs:
    """Streams of different size, to which the blocks add little: sequences settle at different loops."""
    inputs = looped_inputs(batch, length, *sizes, per_sequence_modulation=True)
    scales = torch.logspace(-0.5, 0.2, batch, dtype=torch.float64)
    inputs.modulation[:, :, [2, 5]] *= 0.5
    return inputs._replace(x=inputs.x * scales[:, None, None]).to(torch.float64, device=backend.device)


def thresholds(inputs: LoopedInputs, num_loops):
    """Thresholds well between the relative changes in float64, and the loops after which each sequence stops.

    Those that tell most sequences apart come first.
    """
    states = [inputs.x, *(run(inputs, n, reference.looped_blocks) for n in range(1, num_loops + 1))]
    steps = ((new.flatten(1), old.flatten(1)) for old, new in itertools.pairwise(states))
    changes = torch.stack([(new - old).norm(dim=1) / new.norm(dim=1) for new, old in steps])
    choices = []
    for low, high in itertools.pairwise(changes.flatten().sort().values.tolist()):
        if high > 1.03 * low:
            threshold = (low * high) ** 0.5
            below = torch.cat((changes < threshold, torch.ones_like(changes[:1], dtype=torch.bool)))
            loops = (below.int().argmax(dim=0) + 1).clamp(max=num_loops).tolist()
            choices.append((threshold, loops))
    return sorted(choices, key=lambda choice: -len(set(choice[1])))
