"""Schedules over segments: which there are, how they are written, and what their statistics say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from loopmdm.plan import ComputePlan
from loopmdm.study.schedules.segments import (
    borders,
    enumerate_schedules,
    hand_schedules,
    schedule_text,
    segment_frequency,
    segment_influence,
)


def test_there_are_210_schedules_with_4_of_10_segments_light() -> None:
    schedules = enumerate_schedules(10, 4)
    assert len(schedules) == len(set(schedules)) == 210
    assert all(sum(schedule) == 4 and len(schedule) == 10 for schedule in schedules)
    assert np.sum(schedules, axis=0).tolist() == [84] * 10


def test_hand_schedules_are_the_papers() -> None:
    texts = {name: schedule_text(schedule, 1000) for name, schedule in hand_schedules().items()}
    assert texts == {
        "all light": "L1000",
        "light in quarter 1": "L250,H750",
        "light in quarter 2": "H250,L250,H500",
        "light in quarter 3": "H500,L250,H250",
        "light in quarter 4": "H750,L250",
        "sandwich": "L125,H750,L125",
        "all heavy": "H1000",
    }
    assert schedule_text(hand_schedules()["sandwich"], 128) == "L16,H96,L16"


@pytest.mark.parametrize(("segments", "steps"), [(10, 20), (10, 33), (8, 8), (3, 128)])
def test_a_schedule_covers_every_step_with_segments_of_nearly_one_size(segments: int, steps: int) -> None:
    sizes = [end - start for start, end in pairwise(borders(segments, steps))]
    assert sum(sizes) == steps and max(sizes) - min(sizes) <= 1
    for schedule in enumerate_schedules(segments, 2):
        plan = ComputePlan.parse(schedule_text(schedule, steps), light=1, heavy=3)
        loops = [plan.at(step, steps).num_loops for step in range(steps)]
        assert loops == np.repeat(np.where(schedule, 1, 3), sizes).tolist()


def test_influence_finds_the_segment_that_does_the_harm() -> None:
    schedules = enumerate_schedules(10, 4)
    effect = np.array([0, 0, 0, 2.0, 1.0, 0, 0, 0, 0, -0.5])
    scores = np.array(schedules) @ effect
    influence = segment_influence(schedules, scores)
    # A segment that is light leaves 3 light ones to 9: I_j = e_j (1 - 4/10) + sum of the others (3/9 - 4/10).
    expected = effect * 0.6 + (effect.sum() - effect) * (3 / 9 - 0.4)
    np.testing.assert_allclose(influence, expected, atol=1e-12)
    assert abs(influence.sum()) < 1e-12
    best, worst = segment_frequency(schedules, scores, 20)
    assert worst[3] == 1 and best[3] == 0 and best[9] == 1
    assert best.sum() == pytest.approx(4) and worst.sum() == pytest.approx(4)


def test_statistics_take_resamples_along_leading_axes() -> None:
    schedules = enumerate_schedules(5, 2)
    scores = np.random.default_rng(0).random((7, 10))
    together = segment_influence(schedules, scores)
    for one, row in zip(together, scores, strict=True):
        np.testing.assert_allclose(one, segment_influence(schedules, row))
    best, _ = segment_frequency(schedules, scores, 3)
    for one, row in zip(best, scores, strict=True):
        np.testing.assert_array_equal(one, segment_frequency(schedules, row, 3)[0])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"light must be an integer in 0\.\.10, got 11"):
        enumerate_schedules(10, 11)
    with pytest.raises(ValueError, match="segments must be at least 1, got 0"):
        enumerate_schedules(0, 0)
    with pytest.raises(ValueError, match="steps is 9: 10 segments need at least one step each"):
        borders(10, 9)
    with pytest.raises(ValueError, match=r"got shape \[3\] for 10 schedules"):
        segment_influence(enumerate_schedules(5, 2), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no schedule has segment 0 light"):
        segment_influence([(False, True)], [1.0])
    with pytest.raises(ValueError, match=r"top must be in 1\.\.10, got 11"):
        segment_frequency(enumerate_schedules(5, 2), np.zeros(10), 11)
