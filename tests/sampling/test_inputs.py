"""Prompts, infilling, hooks, the state a run leaves behind, and bad input."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from loopmdm import ComputePlan, sample, terminal
from loopmdm.sampling import Remasking

ORDERS = ["ancestral", "confidence", "left_to_right"]
MASK = 11  # of the `model` fixture: vocab_size 12, max_length 20


@pytest.mark.parametrize("order", ORDERS)
def test_infill_keeps_fixed_positions(model, order):
    generator = torch.Generator().manual_seed(0)
    infill = torch.randint(0, MASK, (6, 15), generator=generator)
    infill[torch.rand(6, 15, generator=generator) < 0.5] = MASK
    before = infill.clone()
    out = sample(model, infill=infill, order=order, seed=1)
    fixed = infill != MASK
    assert torch.equal(out.tokens[fixed], infill[fixed])
    assert (out.tokens != MASK).all()
    assert torch.equal(infill, before)
    assert out.tokens.shape == (6, 15)
    assert out.tokens.dtype == torch.int64


def test_one_infill_for_all_samples(model):
    infill = torch.tensor([3, MASK, MASK, MASK, 4])
    out = sample(model, infill=infill)
    assert out.tokens.shape == (8, 5)
    assert (out.tokens[:, [0, 4]] == torch.tensor([3, 4])).all()
    assert sample(model, 2, infill=infill).tokens.shape == (2, 5)
    assert torch.equal(sample(model, 1, infill=[3, MASK, 4]).tokens[:, [0, 2]], torch.tensor([[3, 4]]))


@pytest.mark.parametrize("order", ORDERS)
def test_prompts_of_variable_length(model, order):
    prompts = [[1, 2, 3], [], [4] * 9, [5]]
    out = sample(model, prompt=prompts, length=9, order=order)
    assert out.tokens.shape == (4, 9)
    for row, prompt in zip(out.tokens.tolist(), prompts, strict=True):
        assert row[: len(prompt)] == prompt
    assert out.network_calls[2] == 0


def test_prompt_forms_agree(model):
    arguments = {"length": 7, "seed": 3}
    expected = sample(model, 3, prompt=[7, 8], **arguments).tokens
    assert (expected[:, :2] == torch.tensor([7, 8])).all()
    forms = (
        torch.tensor([7, 8]).expand(3, -1),
        [[7, 8]] * 3,
        [torch.tensor([7, 8])] * 3,
        np.array([[7, 8]] * 3, dtype=np.int32),
    )
    for prompt in forms:
        assert torch.equal(sample(model, prompt=prompt, **arguments).tokens, expected)
    as_infill = torch.full((3, 7), MASK)
    as_infill[:, :2] = torch.tensor([7, 8])
    assert torch.equal(sample(model, infill=as_infill, seed=3).tokens, expected)


def test_defaults(model):
    out = sample(model)
    assert out.tokens.shape == (8, 20)
    assert out.num_steps == 20
    assert out.history is None
    assert out.seconds > 0


def test_nothing_to_fill(model):
    infill = torch.tensor([[1, 2, 3]])
    for order in ORDERS:
        out = sample(model, infill=infill, order=order)
        assert torch.equal(out.tokens, infill)
        assert out.total_network_calls == out.rows_projected == 0


def test_hook_sees_every_reveal(model):
    seen = []
    out = sample(model, 3, length=8, steps=5, on_step=seen.append, history=True, plan=2)
    assert [event.step for event in seen] == [event.step for event in out.history]
    rebuilt = torch.full((3, 8), MASK)
    for event in seen:
        assert (rebuilt[event.sequence, event.positions] == MASK).all()
        rebuilt[event.sequence, event.positions] = event.tokens
        assert ((event.confidence > 0) & (event.confidence <= 1)).all()
        assert (event.loops == 2).all()
    assert torch.equal(rebuilt, out.tokens)


def test_confidence_is_the_models_probability(model):
    events = sample(model, 1, length=6, order="left_to_right", history=True, temperature=0.5).history
    state = torch.full((1, 6), MASK)
    model.eval()
    for event in events:
        with torch.no_grad():
            logits = model(state)[0, event.positions]
        probability = logits[:, :MASK].softmax(-1).gather(1, event.tokens[:, None]).squeeze(1)
        assert torch.allclose(event.confidence, probability, atol=1e-5)
        state[0, event.positions] = event.tokens


def test_events_are_ordinary_tensors(model):
    event = sample(model, 1, length=4, history=True).history[0]
    event.tokens.add_(1)
    event.loops.add_(1)


def test_a_hook_that_raises_ends_the_run(model):
    model.train()
    model.blocks[1].eval()
    calls = []

    def stop(event):
        calls.append(event.step)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        sample(model, 2, length=8, on_step=stop)
    assert len(calls) == 1
    assert model.training
    assert model.blocks[0].training
    assert not model.blocks[1].training


def test_model_is_left_as_it_was(model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = sample(model, 2, length=8, seed=1)
    assert model.training
    assert torch.equal(sample(model.eval(), 2, length=8, seed=1).tokens, first.tokens), "dropout must be off"
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    model.loss(first.tokens, num_loops=2, seed=0).loss.backward()


def test_bf16_equals_the_callers_autocast(model):
    arguments = {"num_samples": 3, "length": 10, "seed": 2}
    cast = sample(model, dtype=torch.bfloat16, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        outside = sample(model, **arguments)
    assert torch.equal(cast.tokens, outside.tokens)
    assert not torch.is_autocast_enabled("cpu")


def test_no_progress_bar_without_a_terminal(model, capsys):
    sample(model, 1, length=4, progress=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_progress_bar_counts_the_steps(model, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        terminal, "console", lambda: Console(file=screen, force_terminal=True, color_system=None, width=80)
    )
    sample(model, 1, length=4, progress=True)
    assert "sampling" in screen.getvalue() and "4/4 steps" in screen.getvalue()
    before = screen.tell()
    sample(model, 1, length=4, progress=False)
    assert screen.tell() == before


BAD = [
    ({"order": "alphabetical"}, ValueError, "order.*ancestral, confidence, entropy"),
    ({"steps": 0}, ValueError, "steps"),
    ({"steps": 2**30}, ValueError, "steps"),
    ({"steps": 2.5}, TypeError, "steps"),
    ({"num_samples": 0}, ValueError, "num_samples"),
    ({"num_samples": True}, TypeError, "num_samples"),
    ({"length": 0}, ValueError, "length"),
    ({"length": 21}, ValueError, "length is 21.*max_length is 20"),
    ({"length": 2**40}, ValueError, "length is 1099511627776.*max_length is 20"),
    ({"length": 2**31, "block_length": 4}, ValueError, r"length must be below 2\^31.*got 2147483648"),
    ({"temperature": -0.1}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"temperature": float("inf")}, ValueError, "temperature"),
    ({"top_p": 0.0}, ValueError, "top_p"),
    ({"top_p": 1.1}, ValueError, "top_p"),
    ({"top_p": float("nan")}, ValueError, "top_p"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 2**63}, ValueError, "seed"),
    ({"seed": 1.0}, ValueError, "seed"),
    ({"max_batch": 0}, ValueError, "max_batch"),
    ({"dtype": torch.float16}, ValueError, "dtype"),
    ({"plan": 0}, ValueError, "num_loops"),
    ({"plan": "L1,H2"}, ValueError, "the plan uses light, but light is not given"),
    ({"plan": 1.5}, TypeError, "plan must be"),
    ({"plan": ComputePlan.table([1, 2, 3]), "steps": 4}, ValueError, "3 steps.*4 steps"),
    ({"prompt": [1, MASK]}, ValueError, "mask token id 11"),
    ({"prompt": [1, 12]}, ValueError, "0..11"),
    ({"prompt": [-1]}, ValueError, "0..11"),
    ({"prompt": [1] * 21}, ValueError, "21 tokens long"),
    ({"prompt": "hello"}, TypeError, "tokenizer"),
    ({"prompt": ["hello"]}, TypeError, "prompt 0"),
    ({"prompt": [0.5, 1.0]}, TypeError, "integer"),
    ({"prompt": torch.tensor([True])}, TypeError, "integer"),
    ({"prompt": torch.zeros(2, 2, 2, dtype=torch.int64)}, ValueError, "prompt"),
    ({"prompt": [[1], [2]], "num_samples": 3}, ValueError, "num_samples is 3, but prompt has 2"),
    ({"prompt": [[[1]], [[2]]]}, ValueError, "flat list"),
    (
        {"prompt": [1], "infill": torch.tensor([2, MASK])},
        ValueError,
        "contradict each other at position 0: 1 and 2",
    ),
    ({"infill": torch.tensor([1, 12])}, ValueError, "0..11"),
    ({"infill": torch.tensor([1.0])}, TypeError, "integer"),
    ({"infill": torch.tensor(1)}, ValueError, "infill"),
    ({"infill": torch.empty(0, 4, dtype=torch.int64)}, ValueError, "not empty"),
    ({"infill": torch.full((21,), MASK)}, ValueError, "max_length"),
    ({"infill": torch.full((2, 4), MASK), "length": 5}, ValueError, "length is 5"),
    ({"infill": torch.full((2, 4), MASK), "num_samples": 3}, ValueError, "num_samples is 3"),
    ({"prompt": [[1], [2]], "infill": [[MASK]] * 3}, ValueError, "prompt has 2, but infill has 3"),
    ({"length": [3, 4], "num_samples": 3}, ValueError, "num_samples is 3, but length has 2"),
    ({"length": []}, ValueError, "length must be an int or one int a sequence"),
    ({"length": [3, 0]}, ValueError, "length 1 must be at least 1"),
    ({"length": 2.5}, TypeError, "length must be an int"),
    ({"tokens_per_step": 0, "order": "random"}, ValueError, "tokens_per_step must be in 1"),
    ({"tokens_per_step": 2}, ValueError, "tokens_per_step does not go with the order ancestral"),
    ({"steps": 3, "order": "first_hitting"}, ValueError, "steps does not go with the order first_hitting"),
    ({"steps": 3, "threshold": 0.5, "order": "margin"}, ValueError, "steps and threshold are given"),
    ({"threshold": 1.5, "order": "confidence"}, ValueError, "threshold must be a probability"),
    ({"threshold": -0.1, "order": "confidence"}, ValueError, "threshold must be a finite number >= 0"),
    ({"threshold": float("nan"), "order": "entropy"}, ValueError, "threshold must be a finite number"),
    ({"threshold": "high", "order": "entropy"}, TypeError, "threshold must be a number"),
    ({"entropy_bound": float("inf"), "order": "entropy"}, ValueError, "entropy_bound must be a finite"),
    ({"block_length": 0}, ValueError, "block_length must be in 1"),
    ({"block_length": 4, "steps": 3}, ValueError, "steps is 3, but there are 5 blocks"),
    ({"window": 3}, ValueError, "window does not go with the order ancestral"),
    ({"window": 3, "block_length": 3, "order": "margin"}, ValueError, "block_length and window are both"),
    ({"window": 3, "steps": 5, "order": "margin"}, ValueError, "window is 3.*reveals up to 4 positions"),
    ({"remask": "often"}, ValueError, "unknown remasking 'often', accepted are cap, rescale, conf, loop"),
    ({"remask": 0.5}, TypeError, "remask must be None, a name or a Remasking"),
    ({"remask": "cap", "order": "margin"}, ValueError, "remasking goes with the order ancestral"),
    ({"remask": "cap", "block_length": 4}, ValueError, "block_length does not go with remasking"),
    ({"remask": "cap", "eos_token_id": 4}, ValueError, "eos_token_id does not go with remasking"),
    ({"top_k": 0}, ValueError, "top_k must be in 1"),
    ({"forbidden": [12]}, ValueError, "forbidden: 12 is no token id"),
    ({"forbidden": [MASK]}, ValueError, "forbidden: 11 is the mask token"),
    ({"forbidden": range(11)}, ValueError, "forbidden holds all 11 tokens"),
    ({"forbidden": "abc"}, TypeError, "forbidden must be token ids, got a string"),
    ({"forbidden": [1.5]}, TypeError, "a token id is an int, got 1.5"),
    ({"eos_token_id": MASK}, ValueError, "eos_token_id: 11 is the mask token"),
    ({"eos_token_id": True}, TypeError, "eos_token_id: a token id is an int"),
    ({"reference_numerics": True, "order": "random"}, ValueError, "reference_numerics goes with the order"),
    ({"reference_numerics": True, "top_p": 0.9}, ValueError, "top_p does not go with reference_numerics"),
    ({"sequence_ids": [1, 2]}, ValueError, "sequence_ids"),
    ({"num_samples": 2, "sequence_ids": [0, 2**32]}, ValueError, "sequence_ids"),
    ({"num_samples": 2, "sequence_ids": [0, -1]}, ValueError, "sequence_ids"),
    ({"num_samples": 2, "sequence_ids": [0.0, 1.0]}, TypeError, "sequence_ids"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_input_is_named(model, arguments, error, message):
    with pytest.raises(error, match=message):
        sample(model, **arguments)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, order, temperature, bad):
    with torch.no_grad():
        model.blocks[2].attn_out.weight[0, 0] = bad
    with pytest.raises(ValueError, match="not finite at step"):
        sample(model, 2, length=8, order=order, temperature=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta of the remasking must be in"),
        ({"eta": float("nan")}, "eta of the remasking must be in"),
        ({"t_on": 0.5, "t_off": 0.6}, "0 < t_off < t_on < 1"),
        ({"alpha_on": 1.0}, "alpha_on of the remasking must be in"),
    ],
)
def test_remasking_checks_its_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        Remasking("loop", **options)


def test_a_prompt_and_an_infill_that_agree(model):
    infill = [[1, MASK, MASK, MASK, 9], [MASK] * 5]
    out = sample(model, prompt=[1, 2], infill=infill, seed=1)
    assert out.tokens[0, [0, 1, 4]].tolist() == [1, 2, 9]
    assert out.tokens[1, :2].tolist() == [1, 2]
    assert out.rows_projected == 2 + 3


def test_models_of_a_plan_must_fit(model, make_model):
    for overrides, message in (
        ({"vocab_size": 13}, "vocab_size 13"),
        ({"mask_token_id": 0}, "mask_token_id 0"),
        ({"max_length": 19}, "max_length 19"),
    ):
        plan = ComputePlan.parse("L10,H10", light=make_model(**overrides), heavy=2)
        with pytest.raises(ValueError, match=message):
            sample(model, 1, plan=plan)
