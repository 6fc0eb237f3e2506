"""Moments of a stream, against NumPy on everything at once."""

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import no_moments, updated_moments

update = jax.jit(updated_moments)
quick = settings(deadline=None, max_examples=40, derandomize=True)
numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5)


def moments_of(batches):
    moments = no_moments()
    for batch in batches:
        moments = update(moments, np.array(batch, np.float32))
    return moments


@quick
@given(st.lists(numbers, min_size=1, max_size=6))
def test_any_split_gives_the_moments_of_the_whole(batches):
    whole = np.concatenate(batches).astype(np.float64)
    moments = moments_of(batches)
    assert moments.number == len(whole)
    np.testing.assert_allclose(moments.mean, whole.mean(), rtol=1e-5, atol=1e-4)
    scale = np.abs(whole).max() ** 2 * len(whole)
    np.testing.assert_allclose(moments.squares, whole.var() * len(whole), atol=1e-5 * scale)
    if whole.std() > 1e-2 * np.abs(whole).max():
        np.testing.assert_allclose(moments.std, whole.std(), rtol=1e-2)


def test_a_long_stream_far_from_zero_keeps_its_digits():
    """What goes wrong with sums of squares: here they would be 10^10 times the variance."""
    stream = np.random.default_rng(0).normal(1000, 0.01, (300, 16)).astype(np.float32)
    moments = moments_of(stream)
    exact = stream.astype(np.float64)
    assert moments.mean == pytest.approx(exact.mean(), rel=1e-6)
    assert moments.squares / moments.number == pytest.approx(exact.var(), rel=0.02)


def test_before_two_different_numbers_the_deviation_is_one():
    assert no_moments().std == 1
    assert moments_of([[3.0]]).std == 1
    assert moments_of([[3.0, 3.0], [3.0]]).std == 1
    assert moments_of([[3.0], [5.0]]).std == 1.0
    assert moments_of([[3.0], [7.0]]).std == 2.0


@pytest.mark.parametrize("number", [0.1, 3.0, -1000.1, 1e-12, 1e12])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-3])
def test_rounding_is_no_deviation(number, apart):
    """Of a mean, of a float32 model, of a bfloat16 one: divided by it, numbers would be huge."""
    noise = np.random.default_rng(0).uniform(-1, 1, (20, 64))
    assert moments_of(number * (1 + apart * noise)).std == 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_mean_in_units_of_the_deviation_is_bounded_and_the_unit_does_not_matter(scale):
    far = scale * np.array([[99.0, 101.0], [100.0, 100.0]])
    assert moments_of(far).std == pytest.approx(scale * np.sqrt(0.5), rel=1e-4)
    further = scale * np.array([[299.0, 301.0], [300.0, 300.0]])
    assert moments_of(further).std == 1


@pytest.mark.parametrize("number", [-1e20, 3e38, np.inf, np.nan])
def test_numbers_whose_squares_are_not_finite_are_left_out(number):
    """The first has a mean, of the second a few have none."""
    plain, odd = [[3.0, 5.0], [4.0, 8.0]], [number, 1.0, number]
    chex.assert_trees_all_equal(moments_of([odd]), no_moments())
    chex.assert_trees_all_equal(moments_of([plain[0], odd, plain[1]]), moments_of(plain))


def test_whole_numbers_become_float32():
    moments = updated_moments(no_moments(), np.array([1, 2]))
    assert {x.dtype for x in moments} == {np.dtype(np.float32)}
    assert moments.mean == 1.5
