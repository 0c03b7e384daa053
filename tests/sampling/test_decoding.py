"""The value that says how tokens are drawn: one field an argument of `sample`, checked when it is made."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from loopmdm import ComputePlan, sample
from loopmdm.plan import as_plan
from loopmdm.sampling import Decoding, Remasking
from loopmdm.sampling.sampler import sample_with

MASK = 11  # of the `model` fixture
GIVEN = {"num_samples", "length", "prompt", "infill", "sequence_ids"}  # what is sampled
WATCHED = {"on_step", "progress", "history"}


def test_every_argument_of_sample_has_its_place():
    arguments = dict(inspect.signature(sample).parameters)
    decoding = {field.name: field for field in dataclasses.fields(Decoding)}
    assert set(arguments) == {"model", *GIVEN, *WATCHED, *decoding}
    made = Decoding()
    for name in set(decoding) - {"plan", "forbidden"}:
        assert getattr(made, name) == arguments[name].default, name
    assert made.plan == as_plan(arguments["plan"].default) and made.forbidden == ()


def test_values_are_made_plain():
    given = {"plan": 3, "remask": "cap", "forbidden": torch.tensor([5, 2, 5])}
    made = Decoding(temperature=np.float32(0.5), steps=np.int64(4), **given)
    assert (made.plan, made.remask) == (ComputePlan.constant(3), Remasking("cap"))
    assert made.forbidden == (2, 5) and type(made.steps) is int and type(made.temperature) is float
    assert made == dataclasses.replace(made) and hash(made) == hash(dataclasses.replace(made))
    each = Decoding(temperature=torch.tensor([0.5, 1.0]), top_k=np.array([2, 3]), min_p=[0.0, 0.25])
    assert (each.temperature, each.top_k, each.min_p) == ((0.5, 1.0), (2, 3), (0.0, 0.25)) and hash(each)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.steps = 5
    with pytest.raises(ValueError, match="steps and tokens_per_step are given"):
        dataclasses.replace(made, tokens_per_step=2)


def test_what_depends_on_a_model_is_asked_of_the_model(model):
    decoding = Decoding(forbidden=(MASK,))  # a token like any other of a larger vocabulary
    with pytest.raises(ValueError, match="forbidden: 11 is the mask token"):
        sample_with(model, decoding, 1)
    with pytest.raises(ValueError, match="block_length is 21, beyond the model's max_length 20"):
        sample_with(model, Decoding(block_length=21, order="random"), 1)


def test_a_decoding_samples_as_its_options_do(model):
    options = {"order": "margin", "steps": 4, "plan": 2, "seed": 9, "top_k": 5, "eos_token_id": 4}
    expected = sample(model, 3, 12, prompt=[1, 2], **options)
    out = sample_with(model, Decoding(**options), 3, 12, prompt=[1, 2])
    assert torch.equal(out.tokens, expected.tokens) and torch.equal(out.loops, expected.loops)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 12),
        ({"steps": 30}, 30),
        ({"order": "random"}, 9),
        ({"order": "random", "tokens_per_step": 2}, 5),
        ({"order": "random", "plan": ComputePlan.table([1] * 6)}, 6),
        ({"order": "first_hitting", "plan": ComputePlan.table([1] * 6)}, 9),
        ({"remask": "cap"}, 12),
    ],
)
def test_steps_are_known_beforehand(model, options, expected):
    decoding = Decoding(**options)
    assert decoding.num_steps(12, 9) == expected == sample_with(model, decoding, 1, 12, [1, 2, 3]).num_steps


def test_steps_that_predictions_decide_are_not_known():
    assert Decoding(order="margin", threshold=0.5).num_steps(12, 9) is None
    assert Decoding(order="margin", entropy_bound=0.5).num_steps(12, 9) is None
