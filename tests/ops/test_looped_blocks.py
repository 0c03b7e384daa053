"""looped_blocks: values, gradients, loops, masks, per-sequence work."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import LoopedInputs, assert_matches_oracle, error_over_loops, looped_inputs
from loopmdm_kernels.types import BlockWeights


def run(inputs: LoopedInputs, num_loops, op=lk.looped_blocks, **options):
    arguments = {
        "rotary": inputs.rotary,
        "key_mask": inputs.key_mask,
        "num_heads": inputs.num_heads,
        **options,
    }
    return op(inputs.x, inputs.blocks, inputs.modulation, num_loops, **arguments)


def plain_blocks(inputs: LoopedInputs, num_loops: int) -> torch.Tensor:
    """The specification once more, with explicit scores and no shared code, in float64."""
    x = inputs.x
    heads = inputs.num_heads
    hidden = x.shape[-1]
    size = hidden // heads

    def norm(x, weight):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * weight

    def rotate(x):
        if inputs.rotary is None:
            return x
        out = torch.empty_like(x)
        half = size // 2
        for i in range(half):
            cos, sin = inputs.rotary.cos[:, i], inputs.rotary.sin[:, i]
            out[..., i] = x[..., i] * cos - x[..., i + half] * sin
            out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
        return out

    for _ in range(num_loops):
        for weights, mod in zip(inputs.blocks, inputs.modulation, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = (mod[:, i, None, :] for i in range(6))
            h = norm(x, weights.norm1) * (1 + scale1) + shift1
            qkv = h @ weights.qkv.T
            mixed = torch.zeros_like(x)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                q, k, v = (qkv[..., i * hidden : (i + 1) * hidden][..., part] for i in range(3))
                scores = rotate(q) @ rotate(k).transpose(1, 2) / size**0.5
                if inputs.key_mask is not None:
                    scores = scores.masked_fill(~inputs.key_mask[:, None, :], -torch.inf)
                weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
                mixed[..., part] = weight @ v
            x = x + gate1 * (mixed @ weights.attn_out.T)
            h = norm(x, weights.norm2) * (1 + scale2) + shift2
            inner = h @ weights.mlp_in.T + weights.mlp_in_bias
            tanh = torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))
            x = x + gate2 * ((0.5 * inner * (1 + tanh)) @ weights.mlp_out.T + weights.mlp_out_bias)
    return x


@pytest.mark.parametrize("num_loops", [1, 3, 12])
@pytest.mark.parametrize(
    "options", [{}, {"rotary": False}, {"key_mask": True, "per_sequence_modulation": True}]
)
def test_reference_follows_the_specification(num_loops, options):
    inputs = looped_inputs(**options)
    expected = plain_blocks(inputs, num_loops)
    torch.testing.assert_close(run(inputs, num_loops), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_match_the_oracle(dtype):
    inputs = looped_inputs(key_mask=True)
    results = {}
    for name, op, kind in (
        ("out", lk.looped_blocks, dtype),
        ("baseline", reference.looped_blocks, dtype),
        ("oracle", reference.looped_blocks, torch.float64),
    ):
        given = inputs.to(kind, requires_grad=True)
        out = run(given, 3, op)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results[name] = {"out": out.detach(), **{k: v.grad for k, v in given.leaves().items()}}
    for name, value in results["out"].items():
        assert_matches_oracle(value, results["baseline"][name], results["oracle"][name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_over_loops_stays_near_plain_pytorch(dtype):
    curve = error_over_loops(lk.looped_blocks, looped_inputs(), dtype)
    assert [row[0] for row in curve] == list(range(1, 25))
    for num_loops, error, baseline, step in curve:
        assert error <= 2 * baseline + step, f"S = {num_loops}"
    assert curve[-1][2] > 0  # the oracle is not the thing tested


def test_gradcheck():
    inputs = looped_inputs(1, 3, 8, 2, 2, 2).to(torch.float64, requires_grad=True)
    leaves = list(inputs.leaves().values())
    width = len(BlockWeights._fields)

    def call(x, modulation, *weights):
        blocks = [BlockWeights(*weights[i : i + width]) for i in range(0, len(weights), width)]
        return lk.looped_blocks(x, blocks, modulation, 2, num_heads=2, rotary=inputs.rotary)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("num_loops", [2, 3, 7])
def test_e2_loop_equals_unrolled_tied_stack(num_loops):
    looped = looped_inputs().to(torch.float64, requires_grad=True)
    unrolled = looped_inputs().to(torch.float64, requires_grad=True)
    copies = [
        BlockWeights(*(w.detach().clone().requires_grad_() for w in block))
        for _ in range(num_loops)
        for block in unrolled.blocks
    ]
    out = run(looped, num_loops)
    stacked = unrolled._replace(blocks=copies, modulation=unrolled.modulation.repeat(num_loops, 1, 1, 1))
    expected = run(stacked, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    for index, block in enumerate(looped.blocks):
        for name, weight in block._asdict().items():
            total = sum(getattr(copy, name).grad for copy in copies[index :: len(looped.blocks)])
            torch.testing.assert_close(weight.grad, total, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(looped.modulation.grad, unrolled.modulation.grad, rtol=1e-8, atol=1e-10)


def test_recompute_changes_nothing():
    kept, recomputed = (looped_inputs().to(torch.float32, requires_grad=True) for _ in range(2))
    first = run(kept, 4, dropout=0.2, dropout_seed=5)
    second = run(recomputed, 4, dropout=0.2, dropout_seed=5, recompute=True)
    assert torch.equal(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    for (name, a), b in zip(kept.leaves().items(), recomputed.leaves().values(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_dropout_is_a_function_of_its_seed_and_unbiased():
    inputs = looped_inputs(batch=4, length=64).to(torch.float32)
    a, b = (run(inputs, 2, dropout=0.1, dropout_seed=s) for s in (1, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, run(inputs, 2, dropout=0.1, dropout_seed=2))
    # One block, attention gate open, MLP gate closed: dropout acts on that branch, scaled by 1/(1-p).
    mod = torch.zeros_like(inputs.modulation[:1])
    mod[:, :, 2] = 1.0
    one = inputs._replace(blocks=inputs.blocks[:1], modulation=mod)
    branch = run(one, 1) - one.x
    dropped = run(one, 1, dropout=0.25, dropout_seed=3) - one.x
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (branch / 0.75)[kept], rtol=1e-3, atol=1e-5)
    share = kept.float().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / kept.numel()) ** 0.5


def test_loops_per_sequence_equal_separate_calls():
    inputs = looped_inputs(batch=4, key_mask=True, per_sequence_modulation=True)
    loops = torch.tensor([3, 1, 4, 1])
    out = run(inputs, loops)
    for i, num in enumerate(loops.tolist()):
        alone = inputs._replace(
            x=inputs.x[i : i + 1],
            modulation=inputs.modulation[:, i : i + 1],
            key_mask=inputs.key_mask[i : i + 1],
        )
        torch.testing.assert_close(out[i : i + 1], run(alone, num), rtol=1e-10, atol=1e-10)


def test_e13_early_exit():
    inputs = looped_inputs(batch=4)
    full, used = run(inputs, 6, exit_threshold=0.0)
    assert used.tolist() == [6] * 4
    assert torch.equal(full, run(inputs, 6))
    once, used = run(inputs, 6, exit_threshold=float("inf"))
    assert used.tolist() == [1] * 4
    assert torch.equal(once, run(inputs, 1))
    change = [[], [], [], []]
    for loop in range(1, 7):
        new, old = run(inputs, loop), run(inputs, loop - 1) if loop > 1 else inputs.x
        for i in range(4):
            change[i].append(((new[i] - old[i]).norm() / new[i].norm()).item())
    threshold = sorted(c for row in change for c in row)[10] * 1.0001
    out, used = run(inputs, 6, exit_threshold=threshold)
    for i, row in enumerate(change):
        expected = next((k for k, c in enumerate(row, 1) if c < threshold), 6)
        assert used[i] == expected
        torch.testing.assert_close(out[i], run(inputs, expected)[i], rtol=1e-10, atol=1e-10)


def test_masked_keys_do_not_reach_other_positions():
    inputs = looped_inputs(key_mask=True)
    changed = inputs._replace(x=torch.where(inputs.key_mask[..., None], inputs.x, inputs.x + 5.0))
    kept = inputs.key_mask
    torch.testing.assert_close(run(inputs, 3)[kept], run(changed, 3)[kept], rtol=1e-12, atol=1e-12)


def test_input_is_not_written():
    inputs = looped_inputs().to(torch.float32)
    before = inputs.x.clone()
    run(inputs, 2)
    run(inputs, torch.tensor([1, 2]))
    assert torch.equal(inputs.x, before)


BAD = [
    ({"x": torch.zeros(2, 16, 32, dtype=torch.int64)}, TypeError, "x: got int64"),
    (
        {"x": torch.zeros(2, 16, 32, dtype=torch.bfloat16)},
        TypeError,
        "x: got bfloat16, expected float32 or float64",
    ),
    ({"x": torch.zeros(16, 32)}, ValueError, r"x: got shape \[16, 32\], expected \[B, L, D\]"),
    ({"x": torch.zeros(0, 16, 32)}, ValueError, "x: got shape"),
    ({"x": [1.0]}, TypeError, "x: got list"),
    ({"blocks": []}, ValueError, "blocks: got none"),
    ({"blocks": None}, TypeError, "blocks: got NoneType, expected a list of BlockWeights"),
    ({"blocks": {"a": 1}}, TypeError, "blocks: got dict"),
    ({"blocks": torch.zeros(2, 2)}, TypeError, "blocks: got Tensor"),
    ({"blocks": "ab"}, TypeError, r"blocks\[0\]: got str, expected a BlockWeights"),
    ({"blocks": [None]}, TypeError, r"blocks\[0\]: got NoneType"),
    ({"rotary": 1}, TypeError, "rotary: got int, expected a Rotary or None"),
    ({"rotary": ()}, TypeError, "rotary: got tuple of 0"),
    ({"rotary": (None, None)}, TypeError, "rotary.cos: got NoneType"),
    ({"exit_threshold": 10**400}, ValueError, "exit_threshold: got a number beyond float64"),
    (
        {"modulation": torch.zeros(2, 3, 6, 32)},
        ValueError,
        r"modulation: got shape \[2, 3, 6, 32\], expected \[2, 1 or 2",
    ),
    ({"num_loops": 0}, ValueError, "num_loops: got 0, expected at least 1"),
    ({"num_loops": -1}, ValueError, "num_loops: got -1"),
    ({"num_loops": 2**30}, ValueError, r"num_loops: got 1073741824, expected .* below 2\^30"),
    ({"num_loops": torch.tensor([1, 2**30])}, ValueError, "num_loops: got values in 1..1073741824"),
    ({"num_loops": 1.5}, TypeError, "num_loops: got 1.5"),
    ({"num_loops": True}, TypeError, "num_loops: got True"),
    ({"num_loops": torch.tensor([1, 0])}, ValueError, "num_loops: got values in 0..1"),
    ({"num_loops": torch.tensor([1.0, 2.0])}, TypeError, "num_loops: got float32"),
    (
        {"num_loops": torch.tensor([1, 3]), "max_loops": 2},
        ValueError,
        r"num_loops: got values in 1..3, .* 1..2",
    ),
    ({"max_loops": 2}, ValueError, "max_loops: got 2, expected None where all sequences have one num_loops"),
    ({"num_heads": 3}, ValueError, "num_heads: got 3"),
    ({"key_mask": torch.zeros(2, 16, dtype=torch.bool)}, ValueError, "key_mask: a sequence has no key"),
    ({"key_mask": torch.ones(2, 16)}, TypeError, "key_mask: got float32, expected bool"),
    ({"compute_dtype": torch.int8}, TypeError, "compute_dtype: got torch.int8"),
    ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
    ({"exit_threshold": float("nan")}, ValueError, "exit_threshold: got nan"),
    ({"x": torch.zeros(2, 16, 32, device="meta")}, ValueError, r"blocks\[0\].norm1: on cpu, expected meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    inputs = looped_inputs().to(torch.float32)
    arguments = {
        "x": inputs.x,
        "blocks": inputs.blocks,
        "modulation": inputs.modulation,
        "num_loops": 2,
        "num_heads": inputs.num_heads,
        **change,
    }
    with pytest.raises(error, match=message):
        lk.looped_blocks(**arguments)


@pytest.mark.parametrize("wrong", [None, torch.float32, 3, "x", torch.tensor(1.0), torch.zeros(0)])
@pytest.mark.parametrize("name", BlockWeights._fields)
def test_a_weight_that_is_none_is_named(name, wrong):
    inputs = looped_inputs().to(torch.float32)
    blocks = [inputs.blocks[0]._replace(**{name: wrong}), inputs.blocks[1]]
    with pytest.raises((TypeError, ValueError), match=rf"blocks\[0\].{name}: got"):
        run(inputs._replace(blocks=blocks), 1)


def test_wrong_weight_shape_is_named():
    inputs = looped_inputs().to(torch.float32)
    blocks = [inputs.blocks[0], inputs.blocks[1]._replace(mlp_out=torch.zeros(32, 64))]
    with pytest.raises(ValueError, match=r"blocks\[1\].mlp_out: got shape \[32, 64\], expected \[32, 128\]"):
        run(inputs._replace(blocks=blocks), 1)
