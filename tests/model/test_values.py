"""Numbers of any type are taken where numbers are, and what is none is named in one line."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from loopmdm import ComputePlan, LoopMDM, LoopMDMConfig, sample
from loopmdm.data.sudoku import SIX
from loopmdm.exits import HiddenChange
from loopmdm.model.loop_law import LoopLaw
from loopmdm.quality.causal import CausalConfig
from loopmdm.quality.diversity import distinct_n
from loopmdm.quality.likelihood import evaluate_nll, nll_by_time_bin
from loopmdm.sampling import Remasking
from loopmdm.solve import solve_puzzles
from loopmdm.study.schedules.segments import enumerate_schedules
from loopmdm.train import TrainConfig
from loopmdm_kernels import use_backend
from loopmdm_kernels.values import meant, positive, real, whole

SIZES = {"hidden_size": 32, "num_heads": 2, "num_layers": 3, "cond_dim": 8, "max_length": 16}


@pytest.fixture(scope="module")
def model() -> LoopMDM:
    torch.manual_seed(0)
    return LoopMDM(LoopMDMConfig(vocab_size=40, mask_token_id=39, **SIZES)).eval()


IDS = torch.arange(16).reshape(2, 8)


@pytest.mark.parametrize(
    ("value", "as_whole", "as_real"),
    [
        (3, 3, 3),
        (np.int64(3), 3, 3),
        (np.uint8(200), 200, 200),
        (2**63 - 1, 2**63 - 1, 2**63 - 1),
        (2**70, 2**70, 2.0**70),
        (-(10**400), -(10**400), -math.inf),
        (0.5, None, 0.5),
        (np.float32(0.5), None, 0.5),
        (np.float64(3), None, 3.0),
        (True, None, None),
        (np.True_, None, None),
        (None, None, None),
        ("3", None, None),
        (np.array([3]), None, None),
        (torch.tensor(3), None, None),
        (1j, None, None),
    ],
)
def test_whole_and_real(value: Any, as_whole: Any, as_real: Any) -> None:
    for got, expected in ((whole(value), as_whole), (real(value), as_real)):
        assert got == expected and type(got) is type(expected)


def test_meant() -> None:
    names = ("confidence", "margin", "LOUD")
    assert meant("confidance", names) == "; did you mean 'confidence'?"
    assert meant("CONFIDENCE", names) == "; did you mean 'confidence'?"
    assert meant("loud", names) == "; did you mean 'LOUD'?"
    assert meant("--tempreture", ["--temperature", "--top-p"]) == "; did you mean '--temperature'?"
    assert meant("--model", ["--order", "--loops"]) == ""
    assert meant("zzz", names) == meant("", names) == meant(None, names) == meant(3, names) == ""


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 2},
        {"length": 5},
        {"length": [5, 3]},
        {"steps": 2},
        {"seed": 7},
        {"order": "confidence", "tokens_per_step": 2},
        {"order": "margin", "window": 2},
        {"order": "margin", "block_length": 2},
        {"top_k": 3},
        {"eos_token_id": 2},
        {"forbidden": [2, 5]},
        {"max_batch": 1},
        {"plan": 2},
        {"temperature": 0.5, "top_p": 0.5},
        {"order": "confidence", "threshold": 0.5},
        {"order": "entropy", "entropy_bound": 0.5},
        {"prompt": [1, 2]},
        {"num_samples": 1, "sequence_ids": [4]},
    ],
    ids=str,
)
def test_numpy_numbers_of_sample(model: LoopMDM, options: dict[str, Any]) -> None:
    def numpy(value: Any) -> Any:
        if isinstance(value, list):
            return [np.int32(item) for item in value]
        return (
            np.int64(value)
            if isinstance(value, int)
            else np.float32(value)
            if not isinstance(value, str)
            else value
        )

    base = {"length": 4, "progress": False}
    base |= {} if {"sequence_ids", "length", "num_samples"} & set(options) else {"num_samples": 2}
    plain = sample(model, **{**base, **options})
    scalars = sample(model, **{**base, **{name: numpy(value) for name, value in options.items()}})
    assert torch.equal(plain.tokens, scalars.tokens)
    arrays = {name: np.array(value) for name, value in options.items() if isinstance(value, list)}
    if arrays:
        assert torch.equal(plain.tokens, sample(model, **{**base, **options, **arrays}).tokens)


def test_numpy_numbers_of_everything_else(model: LoopMDM) -> None:
    one, two, three = np.int64(1), np.int32(2), np.uint8(3)
    for made, plain in (
        (ComputePlan.constant(three), ComputePlan.constant(3)),
        (ComputePlan.adaptive(np.float32(0.5), three, one), ComputePlan.adaptive(0.5, 3, 1)),
        (ComputePlan.table(np.array([1, 2])), ComputePlan.table([1, 2])),
        (ComputePlan.segments([(two, one), (three, two)]), ComputePlan.segments([(2, 1), (3, 2)])),
        (ComputePlan.parse("L2,H3", light=one, heavy=two), ComputePlan.parse("L2,H3", light=1, heavy=2)),
        (ComputePlan.by_mask_ratio([one, two]), ComputePlan.by_mask_ratio([1, 2])),
    ):
        assert made.to_json() == plain.to_json()
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    config = LoopMDMConfig(np.int64(40), np.int64(39), **sizes, dropout=np.float32(0.5))
    assert json.loads(config.to_json_string()) == LoopMDMConfig(40, 39, **SIZES, dropout=0.5).to_dict()
    causal = {name: size for name, size in SIZES.items() if name != "cond_dim"}
    assert json.dumps(CausalConfig(np.int64(40), np.int64(39), **causal).to_dict())
    assert json.dumps(
        TrainConfig(steps=three, learning_rate=np.float32(0.5), betas=(np.float32(0), 0.5)).to_dict()
    )
    assert torch.equal(
        model.loss(IDS, num_loops=two, seed=one).loss, model.loss(IDS, num_loops=2, seed=1).loss
    )
    plain = evaluate_nll(model, [IDS], num_loops=[1], num_t=2, seed=1, bytes_per_token=2.0)
    assert (
        evaluate_nll(model, [IDS], num_loops=[one], num_t=two, seed=one, bytes_per_token=np.float32(2))
        == plain
    )
    assert nll_by_time_bin(model, [IDS], num_loops=[one], num_bins=two, seed=one)
    assert LoopLaw.uniform(three).sample(one, two) == LoopLaw.uniform(3).sample(1, 2)
    assert Remasking("cap", np.float32(0.5)) == Remasking("cap", 0.5)
    assert type(HiddenChange(np.float32(0.5)).eps) is float
    assert enumerate_schedules(three, one) == enumerate_schedules(3, 1)
    assert float(distinct_n(torch.arange(8).reshape(1, 8), two)) == 1
    boards = np.zeros((2, 36), dtype=np.int64)
    sudoku = LoopMDM(LoopMDMConfig.preset("sudoku6"))
    solved = solve_puzzles(sudoku, boards, SIX, batch_size=one, num_loops=one)
    assert (solved.boards == solve_puzzles(sudoku, boards, SIX, batch_size=2, num_loops=1).boards).all()
    assert positive("num_loops", two) == 2 and type(positive("num_loops", two)) is int


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: sample(m, top_p=None), TypeError, "top_p: got None"),
        (lambda m: sample(m, temperature=None), TypeError, "temperature: got None"),
        (lambda m: sample(m, temperature=2**70), ValueError, "temperature: got 1.1805916207174113e+21"),
        (lambda m: sample(m, temperature=np.array([[1.0]])), TypeError, "temperature: got"),
        (lambda m: sample(m, temperature=np.array([1.0, 2.0])), ValueError, "temperature has 2 values"),
        (lambda m: sample(m, seed=2**64), ValueError, "seed: got 18446744073709551616"),
        (lambda m: sample(m, steps=np.float32(2)), TypeError, "steps must be an int or None"),
        (lambda m: sample(m, steps=np.True_), TypeError, "steps must be an int or None"),
        (lambda m: sample(m, num_samples=np.array([1])), TypeError, "num_samples must be an int"),
        (lambda m: sample(m, threshold="a", order="margin"), TypeError, "threshold must be a number"),
        (lambda m: sample(m, order="confidance"), ValueError, "did you mean 'confidence'"),
        (lambda m: sample(m, order=None), ValueError, "unknown order None"),
        (lambda m: sample(m, order="margin", counts="lada"), ValueError, "did you mean 'llada'"),
        (lambda m: sample(m, remask="rescal"), ValueError, "did you mean 'rescale'"),
        (lambda m: sample(m, on_step=3), TypeError, "on_step must be a function or None, got int"),
        (lambda m: sample(None), TypeError, "model must be a LoopMDM, got NoneType"),
        (lambda m: sample("run"), TypeError, "got str: load it with LoopMDM.from_pretrained"),
        (lambda m: sample(torch.nn.Linear(2, 2)), TypeError, "model must be a LoopMDM, got Linear"),
        (lambda m: sample(m, plan=True), TypeError, "plan must be"),
        (lambda m: m(IDS, attention_mask=[[1] * 8] * 2), TypeError, "attention_mask: got list"),
        (lambda m: m(IDS, labels="a"), TypeError, "labels: got str"),
        (lambda m: m(IDS, 0.5), TypeError, "timesteps: got float"),
        (lambda m: m.loss(IDS, seed="a"), TypeError, "seed: got 'a'"),
        (lambda m: m.loss(IDS, seed=2**64), ValueError, "seed: got 18446744073709551616"),
        (lambda m: m.loss(IDS, seed=-1), ValueError, "seed: got -1"),
        (lambda m: m.loss(IDS, t=0.5), TypeError, "t: got float"),
        (lambda m: m.loss(IDS, prompt_mask=[1]), TypeError, "prompt_mask: got list"),
        (lambda m: evaluate_nll(m, [IDS], num_loops=1), ValueError, "num_loops must be a list"),
        (lambda m: evaluate_nll(m, [IDS], num_loops="12"), ValueError, "num_loops must be a list"),
        (lambda m: evaluate_nll(m, [IDS], num_loops=[1], num_t=2.5), TypeError, "num_t must be an int"),
        (lambda m: evaluate_nll(m, [IDS], num_loops=[1], seed=-1), ValueError, "seed: got -1"),
        (lambda m: evaluate_nll(m, [IDS], num_loops=[1], seed="a"), TypeError, "seed: got 'a'"),
        (lambda m: evaluate_nll(m, None, num_loops=[1]), TypeError, "batches: got NoneType"),
        (lambda m: evaluate_nll(m, IDS, num_loops=[1]), ValueError, "give one tensor as"),
        (lambda m: evaluate_nll(m, [IDS], num_loops=[1], bytes_per_token="x"), ValueError, "bytes_per_token"),
        (lambda m: LoopMDMConfig.preset("smal"), ValueError, "did you mean 'small'"),
        (lambda m: LoopMDMConfig.preset(["tiny"]), ValueError, "preset: got"),
        (lambda m: LoopMDMConfig.preset("sudoku", hiden_size=64), ValueError, "did you mean 'hidden_size'"),
        (lambda m: LoopMDMConfig(40, 39, positions="rotery"), ValueError, "did you mean 'rotary'"),
        (lambda m: TrainConfig.from_dict({"step": 1}), ValueError, "did you mean 'steps'"),
        (lambda m: TrainConfig(steps=1, schedule="cosin"), ValueError, "did you mean 'cosine'"),
        (lambda m: ComputePlan.adaptive(0.1, criterion="hiden"), ValueError, "did you mean 'hidden'"),
        (lambda m: LoopLaw.uniform(2).sample("a", 0), TypeError, "seed must be an int, got 'a'"),
        (lambda m: use_backend("tritn"), ValueError, "did you mean 'triton'"),
    ],
)  # fmt: skip
def test_what_is_no_number_or_name(model: LoopMDM, call: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        call(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [2**64, np.float64(1e19), np.int64(3)])
def test_large_temperatures(model: LoopMDM, temperature: Any) -> None:
    """Nearly uniform, and never the mask."""
    assert int(sample(model, num_samples=50, temperature=temperature, progress=False).tokens.max()) < 39
