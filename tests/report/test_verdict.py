"""Verdicts over seeds: their rate of false positives, and what they need."""

import math

import numpy as np
import pytest

from kdjax.report import verdict


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_without_an_effect_a_fortieth_is_said_to_help_and_one_to_hurt(seeds):
    """Within four standard deviations of a binomial distribution."""
    count = 4000
    gains = np.random.default_rng(seeds).normal(0, 1.7, (count, seeds)).tolist()
    said = [verdict.verdict(one) for one in gains]
    bound = 4 * math.sqrt(count * 0.025 * 0.975)
    for kind in (verdict.HELPS, verdict.HURTS):
        assert abs(said.count(kind) - 0.025 * count) < bound
    assert {*said} == {verdict.HELPS, verdict.HURTS, verdict.NOT_SHOWN}


def test_the_interval_covers_the_mean_at_its_rate():
    count, mean = 4000, 3.0
    gains = np.random.default_rng(0).normal(mean, 2.0, (count, 4)).tolist()
    covered = sum(low <= mean <= high for low, high in map(verdict.interval, gains))
    assert abs(covered - 0.95 * count) < 4 * math.sqrt(count * 0.95 * 0.05)


def test_an_effect_is_found_and_few_seeds_show_nothing():
    assert verdict.verdict([1.0, 1.1, 0.9]) == "helps" and verdict.verdict([-1.0, -1.1, -0.9]) == "hurts"
    assert verdict.verdict([1.0, 1.0001]) == verdict.verdict([5.0]) == "not shown"
    assert verdict.interval([5.0]) is None and verdict.shown(None) == "–"
    # Tables of Student's t: 12.706 with one degree of freedom, 2.262 with nine.
    assert verdict.interval([0.0, 2.0]) == pytest.approx((1 - 12.7062, 1 + 12.7062), abs=1e-4)
    tens = [float(i) for i in range(10)]
    half = 2.262157 * np.std(tens, ddof=1) / math.sqrt(10)
    assert verdict.interval(tens) == pytest.approx((4.5 - half, 4.5 + half), abs=1e-5)
    assert verdict.by_chance(0).endswith("2.5 % hurts.")
