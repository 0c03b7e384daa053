"""docs/laws.md, difference by difference: what this sampler does where a reference does something else.

The other side of each difference is written down here anew, from the law that the page states.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from scipy import stats

from loopmdm import sample
from loopmdm.sampling import Remasking
from loopmdm.sampling.orders import Pace, Slots
from loopmdm.sampling.orders.ancestral import Ancestral
from loopmdm.sampling.orders.pace import Spread
from loopmdm.sampling.remasking import Remasked
from loopmdm_kernels.reference.nucleus import restriction

from .conftest import reveal_steps

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"


def test_every_difference_of_the_page_names_tests_that_exist():
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    numbered = [part for part in sections if re.match(r"\d+\. ", part)]
    assert [int(part.split(".")[0]) for part in numbered] == list(range(1, len(numbered) + 1))
    for part in numbered:
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", part)
        assert named, part.splitlines()[0]
        for module, name in named:
            text = (Path(__file__).parent / f"{module}.py").read_text()
            assert f"def {name}(" in text, (module, name)


def test_the_last_step_is_like_every_other(make_fixed):
    """T equal steps down to t = 0, the last of which draws what is left. Dream's has eps more."""
    steps = reveal_steps(sample(make_fixed(torch.zeros(4, 3)), 8000, steps=8, seed=3, history=True))
    counts = steps.flatten().bincount(minlength=8)
    assert stats.chisquare(counts).pvalue > 0.01

    eps, number = Fraction(1, 1000), 512
    times = [1 - (1 - eps) * i / number for i in range(number + 1)]
    left = Fraction(1)
    for t, s in itertools.pairwise(times[:-1]):
        left *= s / t
    assert left == times[-2] == (1 - eps) / number + eps
    assert float(left * number) == pytest.approx(1.511)


def test_what_is_left_is_drawn_and_not_the_most_probable(make_fixed):
    """One step reveals everything: the law is the prediction. A greedy last step would give token 0 alone."""
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    counts = sample(make_fixed(logits), 20_000, steps=1, seed=2).tokens.flatten().bincount(minlength=3)
    assert stats.chisquare(counts, logits[0].double().softmax(0) * 20_000).pvalue > 0.01


def loop_order(steps: int, **settings: float) -> Remasked:
    slots = Slots(torch.full((1, 4), 9), 9, torch.tensor([0]))
    return Remasked(slots, steps, 0, Remasking("loop", **settings))


def expected_masks(order: Remasked, steps: int) -> list[float]:
    """Expected share of masks before each step and after the last, from the chain of one position."""
    masked = [1.0]
    for step in range(steps):
        reveal, again = order._each(order._reveal, step), order._each(order._rule.sigma, step)
        masked.append(masked[-1] * (1 - float(reveal)) + (1 - masked[-1]) * float(again))
    return masked


@pytest.mark.parametrize("steps", [7, 20, 33, 128, 256, 1000])
@pytest.mark.parametrize("settings", [{}, {"t_on": 0.61, "t_off": 0.07, "alpha_on": 0.83, "eta": 0.1}])
def test_the_loop_stops_at_its_phases(steps, settings):
    """Masks are the 1 - alpha of the schedule at every grid point, on the phases' limits or off them."""
    order = loop_order(steps, **settings)
    rule = order._rule
    for step, share in enumerate(expected_masks(order, steps)[:-1]):
        t = 1.0 - step / steps
        if t > rule.t_on:
            alpha = (1 - t) * rule.alpha_on / (1 - rule.t_on)
        else:
            alpha = rule.alpha_on if t > rule.t_off else 1 - t * (1 - rule.alpha_on) / rule.t_off
        assert share == pytest.approx(1 - alpha, abs=1e-9)
    assert expected_masks(order, steps)[-1] == pytest.approx(0, abs=1e-12)


def unclamped_masks(steps: int) -> list[float]:
    """The same chain by the law of remdm's own loop: a phase's line goes on to the end of its last step."""
    eps, t_on, t_off, alpha_on, eta = 1e-5, 0.55, 0.05, 0.9, 0.02
    masked = [1.0]
    for step in range(steps):
        t = 1 - (1 - eps) * step / steps
        s = t - (1 - eps) / steps
        if t > t_on:
            before, after = (1 - (1 - u) * alpha_on / (1 - t_on) for u in (t, s))
            masked.append(masked[-1] * max(after, 0.0) / before)
        elif t <= t_off:
            masked.append(masked[-1] * s / t)
        else:
            reveal = eta * alpha_on / (1 - alpha_on)
            masked.append(masked[-1] * (1 - reveal) + (1 - masked[-1]) * eta)
    return masked


def test_the_loop_of_the_reference_overshoots():
    """The page's figures, computed; the code itself gave .0000, .0895; .0944 and .0998 in a run."""
    assert min(unclamped_masks(20)[:12]) == pytest.approx(0, abs=2e-5)
    assert unclamped_masks(20)[-1] == pytest.approx(0.0896, abs=5e-4)  # left for the greedy last step
    assert min(unclamped_masks(128)[:64]) == pytest.approx(0.09376, abs=5e-5)
    assert min(unclamped_masks(1024)[:512]) == pytest.approx(0.1, abs=1e-3)
    assert min(expected_masks(loop_order(20), 20)[:12]) == pytest.approx(0.1)


def test_the_loops_eta_is_capped():
    """Beyond (1 - alpha) / alpha = 1/9 more would be masked than the schedule has masks."""
    order = loop_order(100, eta=0.5)
    assert float(order._each(order._rule.sigma, 60)) == pytest.approx(1 / 9)
    assert float(order._each(order._reveal, 60)) == pytest.approx(1.0)
    assert float(loop_order(100, eta=0.05)._each(loop_order(100, eta=0.05)._rule.sigma, 60)) == 0.05


def test_the_loop_tells_the_model_its_share_of_masks():
    """A model with time conditioning is given 1 - alpha, here .1 while the loop rests; remdm gives t."""
    order = loop_order(100)
    assert [float(order.times(step)) for step in (0, 60, 80)] == pytest.approx([1.0, 0.1, 0.1])
    assert float(order.times(22)) == pytest.approx(1 - 0.22 * 2)


def test_conf_rates_the_whole_law(make_fixed):
    """Masking again goes by the probability before top_p: .9 and .36, where the truncated law has 1 and 1."""
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.36, 0.33, 0.31]]).log()
    out = sample(make_fixed(logits), 40_000, steps=3, remask="conf", seed=9, history=True, top_p=0.3)
    early = torch.zeros(40_000, 2, dtype=torch.bool)
    early[out.history[0].sequence, out.history[0].positions] = True
    both = early.all(dim=1)
    gone = out.history[1].tokens == 3
    again = torch.zeros(40_000, 2, dtype=torch.bool)
    again[out.history[1].sequence[gone], out.history[1].positions[gone]] = True
    expected = torch.tensor([-0.9, -0.36], dtype=torch.float64).softmax(0)
    counts = again[both].sum(dim=0)
    assert abs(float(counts[0]) / int(both.sum()) - float(expected[0])) < 4 * math.sqrt(
        0.25 / int(both.sum())
    )
    assert (out.history[0].confidence > 0.35).all()


def test_rescale_multiplies_by_eta_once():
    """sigma = eta min(1, (1 - alpha_s) / alpha_t). duo's max-rescale has eta min(eta, ...)."""
    rule = Remasking("rescale", 0.3)
    assert rule.sigma(0.5, 0.4) == pytest.approx(0.3 * 0.8)
    assert rule.sigma(0.9, 0.8) == pytest.approx(0.3)


def llada_counts(positions: int, steps: int) -> list[int]:
    return [positions // steps + (step < positions % steps) for step in range(steps)]


def even_counts(positions: int, steps: int) -> list[int]:
    return [(step + 1) * positions // steps - step * positions // steps for step in range(steps)]


def counted(out, steps: int, sequence: int = 0) -> list[int]:
    found = [0] * steps
    for event in out.history:
        found[event.step] += int((event.sequence == sequence).sum())
    return found


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "random", "left_to_right"])
def test_counts(make_fixed, order):
    """Step by step, for steps below, at and beyond the positions."""
    for positions in (1, 6, 11):
        model = make_fixed(torch.randn(positions, 3, generator=torch.Generator().manual_seed(positions)))
        for steps in (1, 3, 4, 5, 7, 11, 14, 30):
            for counts, law in (("llada", llada_counts), ("even", even_counts)):
                out = sample(model, 1, steps=steps, order=order, counts=counts, history=True)
                assert counted(out, steps) == law(positions, steps), (positions, steps)


def test_counts_of_llada_for_many_sizes():
    for positions in range(1, 40):
        slots = Slots(torch.full((1, positions), 9), 9, torch.tensor([0]))
        for steps in range(1, 50):
            spread = Spread(slots.blocks, Pace(steps=steps, counts="llada"))
            step_of = spread.step_of(slots.blocks.rank(), slots.blocks.of_slot)
            assert step_of.bincount(minlength=steps).tolist() == llada_counts(positions, steps)
            assert step_of.tolist() == sorted(step_of.tolist())


def test_counts_with_a_window(make_fixed):
    model = make_fixed(torch.randn(11, 3, generator=torch.Generator().manual_seed(1)))
    for order in ("confidence", "random"):
        out = sample(model, 1, steps=4, order=order, counts="llada", window=3, history=True)
        assert counted(out, 4) == [3, 3, 3, 2]
        for event in out.history:
            assert (event.positions <= event.positions.min() + 3 * (event.step + 1)).all()
    with pytest.raises(ValueError, match="window is 2, but with steps=4 a step reveals up to 3 positions"):
        sample(model, 1, steps=4, order="confidence", counts="llada", window=2)


def test_counts_of_blocks(make_fixed):
    """Each block has T / blocks steps, and its own first steps have what is left over."""
    model = make_fixed(torch.randn(13, 3, generator=torch.Generator().manual_seed(1)))
    for order in ("confidence", "left_to_right"):
        out = sample(model, 1, steps=9, order=order, counts="llada", block_length=5, history=True)
        assert counted(out, 9) == [2, 2, 1, 2, 2, 1, 1, 1, 1]
        out = sample(model, 1, steps=12, order=order, counts="llada", block_length=5, history=True)
        assert counted(out, 12) == [2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match='steps is 10, but there are 3 blocks, and with counts="llada"'):
        sample(model, 1, steps=10, order="confidence", counts="llada", block_length=5)
    out = sample(model, 1, steps=10, order="confidence", block_length=5, history=True)
    assert counted(out, 10) == even_counts(5, 3) + even_counts(5, 3) + even_counts(3, 4)


def test_counts_of_each_sequence_are_its_own(model):
    mask = model.config.mask_token_id
    rows = [[mask] * 11, [mask] * 4 + [1] * 3 + [mask] * 4, [2, mask, 2], [1, 1]]
    for order, extra in (
        ("confidence", {}),
        ("random", {}),
        ("entropy", {"eos_token_id": 3}),
        ("margin", {"max_batch": 2}),
    ):
        together = sample(
            model, infill=rows, steps=4, order=order, counts="llada", seed=5, history=True, **extra
        )
        for index, row in enumerate(rows):
            alone = sample(
                model, infill=[row], steps=4, order=order, counts="llada", seed=5, history=True,
                sequence_ids=[index], **{**extra, "max_batch": None},
            )  # fmt: skip
            assert torch.equal(together.tokens[index, : len(row)], alone.tokens[0])
            if not extra:
                assert counted(together, 4, index) == llada_counts(row.count(mask), 4)


def test_counts_of_a_plans_steps(model):
    out = sample(model, 1, length=11, order="confidence", counts="llada", plan="S1:2,S3:2", history=True)
    assert counted(out, 4) == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"counts": "LLaDA"}, ValueError, "unknown counts 'LLaDA', accepted are even, llada"),
        ({"counts": None}, TypeError, "counts must be a name"),
        ({"counts": 3}, TypeError, "counts must be a name"),
        ({"counts": "llada", "tokens_per_step": 2}, ValueError, "but tokens_per_step is given"),
        ({"counts": "llada", "threshold": 0.5}, ValueError, "but threshold is given"),
        ({"counts": "llada", "entropy_bound": 0.5}, ValueError, "but entropy_bound is given"),
        ({"counts": "llada", "order": "ancestral"}, ValueError, "counts does not go with the order ances"),
        ({"counts": "llada", "order": "first_hitting"}, ValueError, "counts does not go with the order fir"),
        ({"counts": "llada", "order": "ancestral", "remask": "cap"}, ValueError, "counts does not go with"),
        (
            {"counts": "llada", "order": "ancestral", "reference_numerics": True},
            ValueError,
            "counts does not go",
        ),
    ],
)  # fmt: skip
def test_counts_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        sample(model, 1, **{"order": "confidence", **options})


def test_counts_default_to_one_a_step(model):
    """Without steps both laws reveal one position a step."""
    one, other = (sample(model, 2, order="margin", counts=c, seed=4).tokens for c in ("even", "llada"))
    assert torch.equal(one, other)


def dream_counts(positions: int, steps: int, eps: float = 1e-3) -> list[int]:
    """floor(left (1 - s/t)) on Dream's grid, and all that is left in the last step; exact arithmetic."""
    grid = [1 - (1 - Fraction(eps)) * i / steps for i in range(steps + 1)]
    found = []
    for t, s in itertools.pairwise(grid[:-1]):
        found.append(math.floor((positions - sum(found)) * (1 - s / t)))
    return [*found, positions - sum(found)]


def test_counts_leave_no_remainder_to_the_last_step(make_fixed):
    """As many steps as positions reveal one each. Dream's reveal none in the first and two in the last."""
    model = make_fixed(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)))
    assert counted(sample(model, 1, steps=32, order="confidence", history=True), 32) == [1] * 32
    assert counted(sample(model, 1, steps=10, order="confidence", history=True), 10) == even_counts(32, 10)
    assert dream_counts(32, 32) == [0] + [1] * 30 + [2]
    assert dream_counts(512, 512) == [0] + [1] * 510 + [2]
    assert dream_counts(32, 10) == [3] * 9 + [5]


def test_blocks_of_any_length(make_fixed):
    """Neither the length nor the steps need be a multiple; blocks begin at the first mask."""
    model = make_fixed(torch.zeros(13, 3))
    out = sample(model, 1, length=13, prompt=[1, 1], block_length=4, steps=7, order="random", history=True)
    first = [int(event.positions.min()) for event in out.history]
    assert [event.positions.numel() for event in out.history] == [2, 2, 2, 2, 1, 1, 1]
    assert [(position - 2) // 4 for position in first] == [0, 0, 1, 1, 2, 2, 2]


# Probabilities of two positions: the most probable token is surer at 0, the drawn one may be at 1.
RATES = torch.tensor([[0.60, 0.20, 0.20], [0.05, 0.50, 0.45]])


@pytest.mark.parametrize(
    "draw",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 5.0},
        {"top_p": 0.45},
        {"top_k": 1},
        {"top_k": 2, "top_p": 0.7},
    ],
)
def test_orders_rate_the_model_not_the_draw(make_fixed, draw):
    """The order is that of the law at temperature 1, untruncated, whatever is drawn from it."""
    for order, first in (("confidence", 0), ("margin", 0), ("entropy", 1)):
        out = sample(make_fixed(RATES.log()), 500, order=order, seed=2, history=True, **draw)
        assert (out.history[0].positions == first).all(), order
    tempered = (RATES.log() / 0.25).softmax(1)  # by a temperature below 1 entropy would choose 0
    entropies = [-(law * law.log()).sum(1) for law in (RATES, tempered)]
    assert [int(entropy.argmin()) for entropy in entropies] == [1, 0]


def test_the_drawn_tokens_probability_is_reported(make_fixed):
    """What LLaDA and Dream rate by is in each event: the drawn token's probability at temperature 1."""
    out = sample(make_fixed(RATES.log()), 2000, order="confidence", seed=2, history=True, top_k=2)
    for event in out.history:
        assert torch.allclose(event.confidence, RATES[event.positions, event.tokens], rtol=1e-4)
    assert out.history[0].confidence.min() < 0.3  # a rare token is written first all the same


LAW = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.45, 2), (0.6, 2), (0.75, 3), (0.95, 4)])
def test_the_nucleus_reaches_top_p(make_fixed, top_p, kept):
    """The token that passes top_p belongs to it. remdm and bd3lms leave it out, but for the first."""
    assert int(restriction(LAW.log(), 1.0, top_p, None).sum()) == kept
    without = max(1, int((LAW.cumsum(1) <= top_p).sum()))
    assert without == max(1, kept - 1)
    counts = sample(make_fixed(LAW.float().log()), 4000, top_p=top_p, seed=3).tokens.flatten().bincount()
    assert counts.numel() == kept
    if kept > 1:
        expected = LAW[0, :kept] / LAW[0, :kept].sum() * 4000
        assert stats.chisquare(counts, expected).pvalue > 0.01


def test_a_nucleus_that_is_reached_is_not_passed():
    """At equality it ends: {.5, .25} reach .75. Dream and duo keep one more there."""
    law = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    assert int(restriction(law.log(), 1.0, 0.75, None).sum()) == 2


def test_top_k_comes_before_top_p():
    """Of the two most probable, renormalised to .57 and .43, the first reaches .5; Dream keeps both."""
    assert restriction(LAW.log(), 1.0, 0.5, 2).tolist() == [[True, False, False, False]]
    assert restriction(LAW.log(), 1.0, 0.5, None).tolist() == [[True, True, False, False]]
    ties = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert restriction(ties.log(), 1.0, 1.0, 2).tolist() == [[True, True, False, False]]


def test_each_step_has_the_width_of_the_grid():
    """The hazard of step i is 1 / (T - i). On bd3lms' grid it is (T - 1) / (T (T - 1 - i))."""
    ours = Ancestral(Slots(torch.full((1, 3), 9), 9, torch.tensor([0])), 10, 0)
    for step in range(10):
        assert float(ours.times(step)) == pytest.approx(1 - step / 10)
    times = torch.linspace(1, 0, 10, dtype=torch.float64)
    hazards = [(1 / 10) / float(t) for t in times[:-1]]
    assert hazards == pytest.approx([9 / (10 * (9 - i)) for i in range(9)])
    assert math.prod(1 - h for h in hazards) > 0.005  # masks left when its t is 0
