"""Cases of looped_blocks in Triton, and what its tests compare."""

import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import LoopedInputs, assert_matches_oracle
from loopmdm_kernels.types import BlockWeights, Rotary

WIDTH = len(BlockWeights._fields)


def triton(*args, **options):
    """The op, which must be done by the Triton kernels."""
    with lk.use_backend("triton"):
        return lk.looped_blocks(*args, **options)


def on(inputs: LoopedInputs, device) -> LoopedInputs:
    return inputs._replace(
        x=inputs.x.to(device),
        blocks=[BlockWeights(*(w.to(device) for w in block)) for block in inputs.blocks],
        modulation=inputs.modulation.to(device),
        rotary=None if inputs.rotary is None else Rotary(*(a.to(device) for a in inputs.rotary)),
        key_mask=None if inputs.key_mask is None else inputs.key_mask.to(device),
    )


def run(inputs: LoopedInputs, num_loops, op=triton, **options):
    """The result without gradients."""
    shared = {"num_heads": inputs.num_heads, "rotary": inputs.rotary, "key_mask": inputs.key_mask}
    with torch.no_grad():
        return op(inputs.x, inputs.blocks, inputs.modulation, num_loops, **{**shared, **options})


def gradients(inputs: LoopedInputs, num_loops, op=triton, **options):
    """Of x, each weight and the modulation, for a fixed gradient of the result."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.leaves().items()}
    weights = list(leaves.values())[2:]
    blocks = [BlockWeights(*weights[i : i + WIDTH]) for i in range(0, len(weights), WIDTH)]
    shared = {"num_heads": inputs.num_heads, "rotary": inputs.rotary, "key_mask": inputs.key_mask}
    out = op(leaves["x"], blocks, leaves["modulation"], num_loops, **{**shared, **options})
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def check(inputs: LoopedInputs, num_loops, dtype, *, weights=None, **options):
    """Compares values with float64; `weights`: their dtype if not that of the computation."""
    rounded = inputs.to(weights or dtype)
    exact_options = {**options, "compute_dtype": None}
    options["compute_dtype"] = dtype
    exact = run(inputs.to(torch.float64), num_loops, reference.looped_blocks, **exact_options)
    baseline = run(rounded, num_loops, reference.looped_blocks, **options)
    out = run(rounded, num_loops, **options)
    if "exit_threshold" in options:
        assert out[1].dtype == torch.int64 and out[1].tolist() == exact[1].tolist()
        out, baseline, exact = out[0], baseline[0], exact[0]
    assert out.dtype == torch.float32
    assert_matches_oracle(out, baseline, exact)


def check_gradients(inputs: LoopedInputs, num_loops, dtype, **options):
    """fp32 parameters, products in `dtype`."""
    rounded = inputs.to(torch.float32)
    plain = {name: value for name, value in options.items() if name != "recompute"}
    exact = gradients(inputs.to(torch.float64), num_loops, reference.looped_blocks, **plain)
    baseline = gradients(rounded, num_loops, reference.looped_blocks, **plain, compute_dtype=dtype)
    for name, grad in gradients(rounded, num_loops, **options, compute_dtype=dtype).items():
        assert grad.dtype == torch.float32
        assert_matches_oracle(grad, baseline[name], exact[name], name=name)
