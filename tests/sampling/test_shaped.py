"""Options of each sequence and of a row's logits: guidance, processors, min_p, the least length."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from loopmdm import sample
from loopmdm.sampling import Decoding, shaped
from loopmdm.sampling.shaped import _draw, _How
from loopmdm_kernels.types import RowRng

MASK = 11  # of the `model` fixture
RUN = {"length": 12, "progress": False, "seed": 3}


@pytest.mark.parametrize("order", ["ancestral", "confidence", "first_hitting"])
@pytest.mark.parametrize("timed", [False, True])
def test_each_sequence_is_drawn_as_it_is_alone(make_model, order, timed):
    model = make_model(time_conditioning=timed)
    options = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.3]),
        "top_k": torch.tensor([11, 3, 11, 5]),
        "top_p": torch.tensor([1.0, 0.9, 0.6, 1.0]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.2]),
    }
    # Where every position is masked the network predicts the same everywhere, and rounding rates them.
    run = {"order": order, "prompt": [2, 7, 1], **RUN}
    together = sample(model, 4, **options, **run)
    assert torch.equal(sample(model, 4, max_batch=1, **options, **run).tokens, together.tokens)
    for row in range(4):
        own = {name: values[row].item() for name, values in options.items()}
        alone = sample(model, 1, sequence_ids=[row], **own, **run)
        assert torch.equal(alone.tokens[0], together.tokens[row]), row


def test_rows_are_drawn_in_parts(model, monkeypatch):
    options = {"min_p": 0.2, "order": "confidence", "num_samples": 3, **RUN}
    expected = sample(model, **options)
    monkeypatch.setattr(shaped, "_ROWS", 5)
    assert torch.equal(sample(model, **options).tokens, expected.tokens)


@pytest.mark.parametrize("order", ["ancestral", "margin"])
def test_a_processor_that_changes_nothing_changes_nothing(model, order):
    seen = []

    def processor(tokens, scores):
        seen.append((tokens.shape, scores.shape, scores.dtype))
        return scores

    expected = sample(model, 3, order=order, steps=5, **RUN)
    out = sample(model, 3, order=order, steps=5, logits_processor=processor, **RUN)
    assert torch.equal(out.tokens, expected.tokens)
    assert torch.equal(out.network_calls, expected.network_calls)
    assert out.rows_projected == expected.rows_projected == sum(scores[0] for _, scores, _ in seen)
    assert all(a == (b[0], 12) and b[1] == 12 and c == torch.float32 for a, b, c in seen)
    assert expected.exact is (order == "ancestral") and not out.exact


def test_a_processor_decides(model):
    def only_even(tokens, scores):
        assert (tokens[:, 0] == 2).all()
        return scores.masked_fill(torch.arange(12) % 2 == 1, -math.inf) / 0.5

    options = {"order": "left_to_right", "prompt": [2], **RUN}
    out = sample(model, 4, logits_processor=only_even, **options)
    assert (out.tokens % 2 == 0).all()
    odd = [1, 3, 5, 7, 9]
    assert torch.equal(out.tokens, sample(model, 4, temperature=0.5, forbidden=odd, **options).tokens)


def test_min_p_is_a_cut_of_the_tempered_distribution():
    """Against the definition, together with top_k and top_p: what all of them allow."""
    torch.manual_seed(0)
    one, rows = torch.randn(9) * 0.8, 40_000
    names = torch.arange(rows)
    rng = RowRng(5, names, torch.zeros_like(names), names)
    for how in (_How(1.4, 1.0, None, 0.15), _How(0.8, 0.7, None, 0.2), _How(1.4, 0.95, 4, 0.05)):
        probs = torch.softmax(one.double() / how.temperature, dim=-1)
        probs[8] = 0  # excluded
        probs /= probs.sum()
        order = probs.argsort(descending=True)
        kept = order[: how.top_k or 9]
        share = probs[kept] / probs[kept].sum()
        kept = kept[share.cumsum(0) - share < how.top_p]
        kept = kept[probs[kept] >= how.min_p * probs.max()]
        law = torch.zeros(9, dtype=torch.float64).index_copy(0, kept, probs[kept] / probs[kept].sum())
        drawn = _draw(one.expand(rows, -1), 8, rng, how).token.bincount(minlength=9).double() / rows
        assert (drawn[law == 0] == 0).all() and 1 < (law > 0).sum() < 8
        assert ((drawn - law).abs() <= 5 * (law * (1 - law) / rows).sqrt()).all(), how


def test_guidance_is_the_formula(model):
    """One step of the greedy order, by full logits."""
    model.eval()
    canvas = torch.full((2, 12), MASK)
    canvas[0, 2:5], canvas[1, 7] = torch.tensor([3, 1, 8]), 4
    given = model(canvas)
    without = model(torch.full_like(canvas, MASK))
    for scale in (0.5, 2.0):
        logits = without + (scale + 1) * (given - without)
        logits[..., MASK] = -math.inf
        events = []
        out = sample(
            model, infill=canvas, cfg_scale=scale, temperature=0.0, steps=1, on_step=events.append, **RUN
        )
        expected = torch.where(canvas == MASK, logits.argmax(dim=-1), canvas)
        assert torch.equal(out.tokens, expected) and out.network_calls.tolist() == [2, 2]
        assert out.loops.tolist() == [2 * model.config.max_loops] * 2
        probs = torch.softmax(logits, dim=-1)[events[0].sequence, events[0].positions, events[0].tokens]
        torch.testing.assert_close(events[0].confidence, probs)
        blocks = sample(model, infill=canvas, cfg_scale=scale, temperature=0.0, order="confidence", **RUN)
        assert blocks.network_calls.tolist() == [2 * 9, 2 * 11]


def test_guidance_reads_what_the_network_reads(model):
    """Beyond the model's length it reads the positions that end with the block."""
    model.eval()
    options = {"cfg_scale": 1.0, "order": "left_to_right", "temperature": 0.0, "progress": False}
    out = sample(model, 1, length=24, block_length=4, prompt=[2, 7, 1], **options)
    assert out.tokens.shape == (1, 24) and (out.tokens != MASK).all()
    last = torch.cat((out.tokens[:, 4:23], torch.tensor([[MASK]])), dim=1)
    given, nothing_given = model(last)[0, -1], model(last)[0, -1]  # no given token is in reach
    logits = nothing_given + 2 * (given - nothing_given)
    logits[MASK] = -math.inf
    assert int(out.tokens[0, -1]) == int(logits.argmax())


@pytest.mark.parametrize("order", ["ancestral", "confidence", "left_to_right"])
def test_no_end_before_its_time(model, order):
    def ends(tokens, scores):
        return scores.index_fill(1, torch.tensor([4]), 50.0)

    options = {"eos_token_id": 4, "logits_processor": ends, "prompt": [1, 2], "order": order, **RUN}
    assert int(sample(model, 3, **options).lengths.max()) == 3 or order != "left_to_right"
    out = sample(model, 3, min_new_tokens=5, **options)
    assert (out.lengths >= 2 + 5 + 1).all() and (out.tokens[:, :7] != 4).all()
    assert (out.lengths == 8).all() or order != "left_to_right"
    assert (sample(model, 3, min_new_tokens=10, **options).tokens != 4).all()


def test_what_is_refused(model):
    for wrong, error, message in (
        ({"min_p": 1.0}, ValueError, "min_p: got 1.0, expected 0 <= min_p < 1"),
        ({"min_p": "a"}, TypeError, "min_p must be a number"),
        ({"min_p": [0.1, -0.1]}, ValueError, "min_p: got -0.1"),
        ({"cfg_scale": -1}, ValueError, "cfg_scale must be a finite number >= 0"),
        ({"logits_processor": 3}, TypeError, "logits_processor must be a function or None, got int"),
        ({"min_new_tokens": 3}, ValueError, "eos_token_id may be drawn, which is not given"),
        ({"min_new_tokens": 0, "eos_token_id": 1}, ValueError, "min_new_tokens must be in 1"),
        ({"top_k": [2, 0]}, ValueError, "top_k must be in 1"),
        ({"top_k": [2, None]}, TypeError, "top_k must be an int for each sequence"),
        ({"temperature": [1.0, -1.0]}, ValueError, "temperature: got -1.0"),
        ({"cuda_graphs": True, "min_p": 0.1}, ValueError, "cuda_graphs does not go with options of a row"),
        ({"reference_numerics": True, "cfg_scale": 1.0}, ValueError, "cfg_scale does not go with reference"),
    ):
        with pytest.raises(error, match=message.replace("(", r"\(")):
            Decoding(**wrong)
    with pytest.raises(ValueError, match="temperature has 2 values, but there are 3 sequences"):
        sample(model, 3, temperature=[0.5, 1.0], **RUN)
    for bad in (lambda tokens, scores: scores[:, :3], lambda tokens, scores: None):
        with pytest.raises(ValueError, match="logits_processor: returned"):
            sample(model, 1, logits_processor=bad, **RUN)
    assert {field.name for field in dataclasses.fields(Decoding)} >= {*_How._fields}
