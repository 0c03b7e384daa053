"""The CUDA kernels on a GPU (`make gpu`). A wait that lasts ends in an error, not in a hang.

Hopper runs the kernel for older GPUs too.
"""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda.targets import SM80, target_of
from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["its own kernel", "that for older GPUs"])
def target(request, monkeypatch):
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        pytest.skip("needs compute capability 8.0")
    own = target_of(capability)
    if request.param == "that for older GPUs":
        if own.entry == SM80.entry:
            pytest.skip("that is its own")
        own = SM80._replace(architecture=f"sm_{capability[0]}{capability[1]}")
        monkeypatch.setattr(op, "target_of", lambda capability: own)
    return own


def inputs_on_gpu(batch, length, hidden=768, heads=12, **options):
    return looped_inputs(batch, length, hidden, heads, **options).to(torch.bfloat16, device="cuda")


def apply(op, inputs, loops, **options):
    with torch.no_grad():
        return op(
            inputs.x, inputs.blocks, inputs.modulation, loops,
            num_heads=inputs.num_heads, rotary=inputs.rotary, key_mask=inputs.key_mask, **options,
        )  # fmt: skip


def ours(inputs, loops, **options):
    with lk.use_backend("cuda"):
        return apply(lk.looped_blocks, inputs, loops, **options)


@pytest.mark.parametrize("loops", [1, 2, 12, 24])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 32), (3, 81), (1, 128), (2, 1000), (1, 1024)])
def test_values(batch, length, loops):
    inputs = inputs_on_gpu(batch, length, key_mask=length == 81, per_sequence_modulation=batch == 3)
    out = ours(inputs, loops)
    baseline = apply(reference.looped_blocks, inputs, loops)
    assert_matches_oracle(out, baseline, apply(reference.looped_blocks, inputs.to(torch.float64), loops))
    assert torch.equal(out, ours(inputs, loops)), "the same call gives the same bits"


@pytest.mark.parametrize(("hidden", "heads"), [(64, 4), (128, 4), (256, 8), (512, 8), (1024, 16), (1024, 8)])
def test_other_widths(hidden, heads, target):
    if hidden // heads not in target.head_dims:
        pytest.skip(f"has no heads of {hidden // heads}")
    inputs = inputs_on_gpu(2, 150, hidden, heads)
    baseline = apply(reference.looped_blocks, inputs, 3)
    oracle = apply(reference.looped_blocks, inputs.to(torch.float64), 3)
    assert_matches_oracle(ours(inputs, 3), baseline, oracle)


@pytest.mark.parametrize(("hidden", "heads"), [(768, 12), (128, 4)])
def test_a_row_does_not_depend_on_its_batch(hidden, heads):
    """Tiles follow the batch; what a row gives must not."""
    inputs = inputs_on_gpu(4, 81, hidden, heads)
    whole = ours(inputs, 3)
    for sequence in range(4):
        alone = inputs._replace(x=inputs.x[sequence : sequence + 1])
        assert torch.equal(ours(alone, 3)[0], whole[sequence])


def test_loops_of_each_sequence_and_early_exit():
    inputs = inputs_on_gpu(4, 81)
    scale = torch.tensor([1e-2, 1.0, 30.0, 1e3], device="cuda")[:, None, None]
    inputs = inputs._replace(x=inputs.x * scale)
    loops = torch.tensor([3, 1, 7, 2], device="cuda")
    expected = apply(reference.looped_blocks, inputs.to(torch.float64), loops)
    assert_matches_oracle(ours(inputs, loops), apply(reference.looped_blocks, inputs, loops), expected)
    _, used = ours(inputs, 12, exit_threshold=0.2)
    _, expected_used = apply(reference.looped_blocks, inputs.to(torch.float64), 12, exit_threshold=0.2)
    assert torch.equal(used, expected_used)


@pytest.mark.parametrize(("batch", "length", "heads"), [(2, 81, 12), (1, 300, 12), (1, 200, 6)])
def test_gradients(batch, length, heads, target):
    if target.entry == SM80.entry:
        pytest.skip("has no backward pass")
    inputs = inputs_on_gpu(batch, length, 768, heads, key_mask=batch > 1, per_sequence_modulation=batch > 1)
    grad = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(0)).cuda()

    def gradients(op, dtype=torch.bfloat16):
        given = inputs.to(dtype, requires_grad=True)
        out = op(
            given.x, given.blocks, given.modulation, 3,
            num_heads=heads, rotary=given.rotary, key_mask=given.key_mask,
        )  # fmt: skip
        leaves = given.leaves()
        return dict(
            zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)), strict=True)
        )

    with lk.use_backend("cuda"):
        found, again = gradients(lk.looped_blocks), gradients(lk.looped_blocks)
    baseline = gradients(reference.looped_blocks)
    for name, expected in gradients(reference.looped_blocks, torch.float64).items():
        assert_matches_oracle(found[name], baseline[name], expected, name=name)
        assert torch.equal(found[name], again[name]), "the same call gives the same bits"


def test_one_graph_serves_all_numbers_of_loops():
    inputs = inputs_on_gpu(1, 64)
    loops = torch.tensor([3], device="cuda")
    ours(inputs, loops)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(inputs, loops)
    for number in (1, 5, 12):
        loops.fill_(number)
        graph.replay()
        assert torch.equal(out, ours(inputs, number))


def test_a_write_through_data_is_seen_by_calls_and_graphs():
    inputs = inputs_on_gpu(1, 64)
    first = ours(inputs, 2)
    ours(inputs, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = ours(inputs, 2)
    weight = inputs.blocks[1].mlp_in
    kept = weight.clone()
    weight.data.copy_(-kept)
    changed = ours(inputs, 2)
    assert not torch.equal(changed, first)
    graph.replay()
    assert torch.equal(replayed, changed)
    weight.data.copy_(kept)
    graph.replay()
    assert torch.equal(replayed, first)
