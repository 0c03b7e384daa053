"""Kernels that load weights in e4m3: the bits of bf16 weights of the same values, on old processors too."""

from importlib.resources import files

import numpy as np
import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import LoopMDM
from loopmdm.data import sudoku
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs, looped_inputs, reference, row_rng
from loopmdm_kernels.triton import operands as head_module
from loopmdm_kernels.triton.launch import Processor
from loopmdm_kernels.types import FP8, Fp8BlockWeights, Fp8Head, Fp8Weight, Head, RowRng
from tests.looped_blocks.cases import run

BF16, HALF = torch.bfloat16, torch.float16


def triton(*args, **options):
    with lk.use_backend("triton"):
        return lk.looped_blocks(*args, **options)


@pytest.fixture(params=["e4m3", "bytes"])
def loaded_as(request, monkeypatch):
    """Processors before compute capability 8.9 load bytes."""
    if request.param == "bytes":
        monkeypatch.setattr(head_module, "processor", lambda device: Processor(80, 108))


def case(device, dtype):
    inputs = looped_inputs(1, 9, 48, 3, 1, 2).to(dtype, device=device)
    return inputs, [Fp8BlockWeights.of(block) for block in inputs.blocks]


def test_every_number(device, loaded_as):
    """A product with the identity gives each finite e4m3 number, exactly, in each dtype of operands."""
    values = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    values = values[values.float().isfinite()][:252].reshape(14, 18)
    head = Fp8Head(
        torch.zeros(18, device=device),
        Fp8Weight(values, torch.full((14,), 0.5, device=device)),
        torch.zeros(14, device=device),
        torch.zeros(1, 2, 18, device=device),
    )
    for dtype in (torch.float32, BF16, HALF):
        for column in (0, 5, 17):
            head.modulation.zero_()[0, 0, column] = 1.0  # the norm's scale is zero: h is the shift
            with lk.use_backend("triton"):
                logits = lk.head_logits(torch.ones(1, 1, 18, device=device), head, compute_dtype=dtype)
            assert torch.equal(logits[0, 0].float(), 0.5 * values[:, column].float())


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_looped_blocks(device, dtype, loaded_as):
    inputs, blocks = case(device, dtype)
    plain = inputs._replace(blocks=[block.dequantized(dtype) for block in blocks])
    narrow = inputs._replace(blocks=blocks)
    out = run(narrow, 2, triton, compute_dtype=dtype)
    oracle = run(plain.to(torch.float64), 2, reference.looped_blocks)
    assert_matches_oracle(out, run(plain, 2, reference.looped_blocks), oracle)
    if dtype == BF16:
        assert torch.equal(out, run(plain, 2, triton))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, HALF], ids=str)
def test_head(device, dtype, loaded_as):
    hidden, wide = head_inputs(2, 9, 36, 71, excluded_token=70, per_sequence_modulation=True)
    hidden = hidden.float().to(device)
    narrow = Fp8Head.of(Head(*(t.to(device, dtype) for t in wide[:4]), 70))
    plain = narrow.dequantized(dtype)
    rows = torch.arange(0, 18, 2, device=device)
    rng = RowRng(3, *(name.to(device) for name in row_rng(9)[1:]))
    targets = torch.randint(70, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    weights = torch.ones(9, device=device)

    def results(head):
        with lk.use_backend("triton"), torch.no_grad():
            options = {"compute_dtype": dtype}
            drawn = lk.sample_rows(hidden, head, rows, rng, **options)
            nucleus = lk.sample_rows(hidden, head, rows, rng, top_p=0.8, **options)
            _, nll = lk.masked_cross_entropy(hidden, head, targets, rows, weights, **options)
            return [*drawn, *nucleus, nll, lk.head_logits(hidden, head, **options)]

    for out, expected in zip(results(narrow), results(plain), strict=True):
        assert torch.equal(out, expected)
    exact = Head(*(t.double() for t in plain[:4]), 70)
    baseline, oracle = (
        reference.masked_cross_entropy(h, head, targets, rows, weights)[1]
        for h, head in ((hidden, plain), (hidden.double(), exact))
    )
    assert_matches_oracle(results(narrow)[-2], baseline, oracle)


def test_no_gradients(device):
    inputs, blocks = case(device, BF16)
    leaf = inputs.x.clone().requires_grad_()
    with pytest.raises(ValueError, match="blocks: fp8 weights are for inference"):
        triton(leaf, blocks, inputs.modulation, 1, num_heads=3, compute_dtype=BF16)


def test_model(device):
    """The tolerance of tests/model/test_fp8_weights.py holds for the kernels with bf16 operands."""
    model = LoopMDM.from_pretrained(str(files("loopmdm") / "checkpoints" / "sudoku6")).to(device)
    puzzle = sudoku.generate(sudoku.SIX, 1, seed=5, clues=(16, 20))
    tokens = torch.from_numpy(puzzle.solutions.astype(np.int64)).to(device) - 1
    rows = torch.arange(0, 36, 3, device=device)
    noisy = tokens.flatten().index_fill(0, rows, model.config.mask_token_id).view(1, 36)

    def nll():
        options = {"compute_dtype": model.compute_dtype}
        hidden = model.hidden(noisy, num_loops=2)
        weights = torch.ones(12, device=device)
        return lk.masked_cross_entropy(hidden, model.head(), tokens, rows, weights, **options)[1]

    with torch.no_grad():
        with lk.use_backend("reference"):
            expected = nll()
        model.use_fp8_weights()
        with lk.use_backend("triton"), torch.autocast(device.type, BF16):
            assert abs(float(nll().mean() - expected.mean())) < 0.01
