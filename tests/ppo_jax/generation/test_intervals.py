"""Intervals against SciPy's own, and against how often they hold what is true."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ppo_jax.generation.intervals import mean_interval, share_interval, wilson_interval


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 20), (3, 20), (106, 256), (64, 64)])
def test_wilson_is_scipys(right: int, count: int) -> None:
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(right / count, count), expected, atol=1e-12)
    zeros_and_ones = np.arange(count) < right
    np.testing.assert_allclose(share_interval(zeros_and_ones), expected, atol=1e-12)
    # Four answers to each prompt that are all alike are no more than one.
    np.testing.assert_allclose(share_interval(zeros_and_ones, 4), expected, atol=1e-12)


def test_shares_of_several_answers_by_hand() -> None:
    """Ten shares of 1/4 and 3/4 have variance 0.625 / 9: those of 36 trials of probability 1/2."""
    expected = stats.binomtest(18, 36).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(share_interval([0.25, 0.75] * 5, 4), expected, atol=1e-12)


def test_no_more_trials_are_counted_than_there_were() -> None:
    expected = stats.binomtest(20, 40).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(share_interval([0.5] * 10, 4), expected, atol=1e-12)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_more_samples_of_a_prompt_never_widen_the_interval(right: list[int]) -> None:
    shares = np.array(right) / 8
    low, high = share_interval(shares, 8)
    mean = float(shares.mean())
    assert 0 <= low <= mean <= high <= 1
    widest = wilson_interval(mean, len(shares))
    narrowest = wilson_interval(mean, 8 * len(shares))
    assert widest[0] - 1e-12 <= low <= narrowest[0] + 1e-12
    assert narrowest[1] - 1e-12 <= high <= widest[1] + 1e-12


def test_intervals_of_shares_hold_the_truth_as_often_as_they_say() -> None:
    """Prompts of probability 0.02 to 0.98, four answers each; 3000 evaluations of 100 prompts."""
    rng = np.random.default_rng(0)
    truth, held = 0.4, 0
    for _ in range(3000):
        probabilities = rng.beta(0.8, 1.2, 100)  # mean 0.4
        shares = rng.binomial(4, probabilities) / 4
        low, high = share_interval(shares, 4)
        held += low <= truth <= high
    assert abs(held / 3000 - 0.95) < 0.015


def test_means_have_students_interval() -> None:
    x = np.random.default_rng(1).normal(2, 3, 12)
    expected = stats.t.interval(0.95, 11, loc=x.mean(), scale=stats.sem(x))
    np.testing.assert_allclose(mean_interval(x), expected)
    assert mean_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert mean_interval([1.0]) is None
    assert mean_interval([]) is None


@pytest.mark.parametrize(("share", "count"), [(1.5, 4), (-0.1, 4), (0.5, 0), (math.nan, 4)])
def test_what_is_no_share(share: float, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(share, count)


@pytest.mark.parametrize("shares", [[], [0.5, 1.1], [-0.5]])
def test_what_are_no_shares(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        share_interval(shares)
