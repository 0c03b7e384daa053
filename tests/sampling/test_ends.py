"""Lengths: sequences of different length, ends of sequences, and sequences longer than the network reads."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from loopmdm import ComputePlan, sample
from loopmdm.sampling import ORDERS


@pytest.mark.parametrize("order", ORDERS)
def test_variable_lengths(model, order):
    """Each sequence is what it is alone; padding is behind it and nowhere else."""
    lengths = [5, 12, 1, 12]
    prompt = [[1, 2], [], [3], [4, 4, 4]]
    out = sample(model, length=lengths, prompt=prompt, order=order, seed=4)
    assert out.tokens.shape == (4, 12)
    assert out.lengths.tolist() == lengths
    for index, length in enumerate(lengths):
        alone = sample(model, 1, length, None, order, prompt=[prompt[index]], seed=4, sequence_ids=[index])
        assert torch.equal(out.tokens[index, :length], alone.tokens[0])
        assert (out.tokens[index, length:] == -1).all()
        assert int(out.network_calls[index]) == int(alone.network_calls[0])


def test_infills_of_different_length(model):
    mask = model.config.mask_token_id
    rows = [[1, mask, 2], [mask] * 7, [5, mask]]
    out = sample(model, infill=rows, order="confidence", seed=1, plan=ComputePlan.adaptive(0.3, 4))
    assert out.lengths.tolist() == [3, 7, 2]
    assert out.tokens[0, 0] == 1 and out.tokens[0, 2] == 2 and out.tokens[2, 0] == 5
    for index, row in enumerate(rows):
        alone = sample(
            model,
            infill=[row],
            order="confidence",
            seed=1,
            sequence_ids=[index],
            plan=ComputePlan.adaptive(0.3, 4),
        )
        assert torch.equal(alone.tokens[0], out.tokens[index, : len(row)])
        assert int(alone.loops) == int(out.loops[index])


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_behind_an_end_is_computed(make_fixed, order):
    """Position 2 of 8 is the end token for certain."""
    logits = torch.zeros(8, 4)
    logits[:, 3] = -40.0
    logits[2] = torch.tensor([-40.0, -40.0, -40.0, 40.0])
    out = sample(make_fixed(logits), 40, order=order, eos_token_id=3, seed=2, history=True)
    assert (out.lengths == 3).all()
    assert (out.tokens[:, :2] < 3).all()
    assert (out.tokens[:, 2:] == 3).all()
    ended = torch.zeros(40, dtype=torch.bool)
    for event in out.history:
        assert not (ended[event.sequence] & (event.positions > 2)).any()
        ended[event.sequence[event.tokens == 3]] = True
    assert ended.all()
    full = sample(make_fixed(logits), 40, order=order, seed=2)
    assert out.rows_projected < full.rows_projected
    assert (out.network_calls <= full.network_calls).all()
    if order == "left_to_right":
        assert (out.network_calls == 3).all()


def test_what_comes_before_an_end_is_unbiased(make_posterior):
    """The law of the text up to its end is the model's: chain rule, whatever is left out behind it."""
    generator = torch.Generator().manual_seed(2)
    law = torch.rand((3,) * 3, generator=generator, dtype=torch.float64)
    law = (law / law.sum()).float()
    truncated: dict[tuple[int, ...], float] = {}
    for tokens in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        key = tuple(tokens[: tokens.index(2) + 1]) if 2 in tokens else tuple(tokens)
        truncated[key] = truncated.get(key, 0.0) + float(law[tuple(tokens)])
    out = sample(make_posterior(law), 40_000, order="random", eos_token_id=2, seed=5, max_batch=8192)
    counts = dict.fromkeys(truncated, 0)
    for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True):
        counts[tuple(row[:length])] += 1
    expected = [probability * 40_000 for probability in truncated.values()]
    scale = 40_000 / sum(expected)
    assert stats.chisquare(list(counts.values()), [e * scale for e in expected]).pvalue > 0.01


def test_an_end_that_was_given_ends_nothing(make_fixed):
    infill = torch.tensor([2, 2, 3, 2, 3])  # 3 is the mask, 2 the end
    out = sample(make_fixed(torch.tensor([[9.0, 0.0, -40.0]]).expand(5, 3)), 4, infill=infill, eos_token_id=2)
    assert (out.lengths == 5).all()
    assert (out.tokens[:, [2, 4]] < 2).all()
    assert torch.equal(out.tokens[:, [0, 1, 3]], torch.tensor([[2, 2, 2]]).expand(4, 3))


def test_given_tokens_behind_an_end_stay(make_fixed):
    logits = torch.tensor([[-40.0, -40.0, 40.0]]).expand(5, 3)  # always the end, 2
    infill = torch.tensor([0, 3, 3, 1, 3])
    out = sample(make_fixed(logits), 2, infill=infill, eos_token_id=2, order="left_to_right")
    assert out.tokens.tolist() == [[0, 2, 2, 1, 2]] * 2
    assert out.lengths.tolist() == [2, 2]
    assert out.network_calls.tolist() == [1, 1]


@pytest.mark.parametrize("order", ORDERS)
def test_longer_than_the_network_reads(model, order):
    """max_length is 20: the network reads the 20 positions that end with the block."""
    widths, reads = [], []
    hidden = type(model).hidden

    def spy(self, ids, *arguments, **options):
        widths.append(ids.shape[1])
        reads.append(ids.clone())
        return hidden(self, ids, *arguments, **options)

    type(model).hidden = spy
    try:
        out = sample(model, 2, length=53, order=order, block_length=8, seed=3, plan=1, prompt=[1, 2, 3])
    finally:
        type(model).hidden = hidden
    assert out.tokens.shape == (2, 53)
    assert ((out.tokens >= 0) & (out.tokens != model.config.mask_token_id)).all()
    assert (out.tokens[:, :3] == torch.tensor([1, 2, 3])).all()
    assert set(widths) == {20}
    last = reads[-1]  # the last block is the positions 51 and 52: what is read ends there
    known = last[-1] != model.config.mask_token_id
    assert torch.equal(last[-1][known], out.tokens[-1, 33:][known]) or torch.equal(
        last[-1][known], out.tokens[0, 33:][known]
    )
    alone = sample(
        model, 1, length=53, order=order, block_length=8, seed=3, plan=1, prompt=[1, 2, 3], sequence_ids=[1]
    )
    assert torch.equal(alone.tokens[0], out.tokens[1])


def test_length_is_bounded_without_blocks(model):
    with pytest.raises(ValueError, match=r"length is 53, but the model's max_length is 20; a block_length"):
        sample(model, 1, length=53)
    with pytest.raises(ValueError, match="block_length is 21, beyond the model's max_length 20"):
        sample(model, 1, length=53, block_length=21)
