"""A model whose matrices are rounded to e4m3: what its predictions lose, and what it leaves alone."""

from importlib.resources import files

import numpy as np
import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import LoopMDM, sample
from loopmdm.data import sudoku
from loopmdm.solve import solve_puzzles
from loopmdm_kernels.types import Fp8BlockWeights, Fp8Head, Fp8Weight

# The tolerance, on the blanks of 6x6 puzzles all at once, at six loops: nats, and the share of
# equal most probable digits. What was seen is in docs/measured.md.
NATS, SAME = 0.01, 0.98


@pytest.fixture
def model():
    return LoopMDM.from_pretrained(str(files("loopmdm") / "checkpoints" / "sudoku6"))


def blanks(model, puzzles):
    """-log p of the solution and the most probable digit, at each blank."""
    solutions = torch.from_numpy(puzzles.solutions.astype(np.int64)) - 1
    given = torch.from_numpy(puzzles.clues != 0)
    tokens = torch.where(given, solutions, model.config.mask_token_id)
    with torch.no_grad(), lk.use_backend("reference"):
        logits = model(tokens)[..., : model.config.mask_token_id]
    nll = -logits.log_softmax(-1).gather(-1, solutions[..., None])[..., 0]
    return nll[~given].double(), logits.argmax(-1)[~given]


def test_predictions(model):
    puzzles = sudoku.generate(sudoku.SIX, 64, seed=5, clues=None, split="test")
    nll, digits = blanks(model, puzzles)
    model.use_fp8_weights()
    rounded_nll, rounded_digits = blanks(model, puzzles)
    assert not torch.equal(rounded_nll, nll)
    assert abs(float(rounded_nll.mean() - nll.mean())) < NATS
    assert float((rounded_digits == digits).double().mean()) > SAME
    assert solve_puzzles(model, puzzles.clues[:16], sudoku.SIX).accuracy > 0.9
    model.use_fp8_weights(blocks=False, head=False)
    assert torch.equal(blanks(model, puzzles)[0], nll)


def test_what_is_rounded(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.use_fp8_weights(head=False)
    assert isinstance(model.block_weights(0, 1)[0], Fp8BlockWeights)
    assert not isinstance(model.head(), Fp8Head)
    model.use_fp8_weights(blocks=False)
    assert not isinstance(model.block_weights(0, 1)[0], Fp8BlockWeights)
    assert isinstance(model.head(), Fp8Head)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_rounded_once_a_run(model, monkeypatch):
    model.use_fp8_weights()
    made = []
    plain = Fp8Weight.of
    monkeypatch.setattr(Fp8Weight, "of", lambda weight: made.append(weight.shape) or plain(weight))
    sample(model, num_samples=1, length=36, steps=4, progress=False)
    assert len(made) == 4 * model.config.num_layers + 1


def test_no_training(model):
    model.use_fp8_weights()
    tokens = torch.zeros(1, 36, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="blocks: fp8 weights are for inference, and a gradient is wanted of x"
    ):
        model.loss(tokens)
    model.use_fp8_weights(blocks=False)
    with pytest.raises(ValueError, match="head: fp8 weights are for inference"):
        model.loss(tokens)
