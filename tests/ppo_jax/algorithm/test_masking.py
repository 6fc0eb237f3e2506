import inspect

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import masked_mean, masked_var, masked_whiten
from ppo_jax.algorithm.masking import zero_invalid

SHAPE = (3, 5)
MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
GARBAGE = np.resize(np.array([np.nan, np.inf, -np.inf, 3e38], np.float32), SHAPE)
X = np.array([[1, 2, 3, 9, 9], [9, 4, 9, 6, 9], [5, 7, 0, -2, 1]], np.float32)

numbers = hnp.arrays(np.float32, SHAPE, elements=st.floats(-100, 100, width=32))
masks = hnp.arrays(bool, SHAPE)
quick = settings(deadline=None, max_examples=40, derandomize=True)


class StatisticsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_mean_and_variance_by_hand(self):
        # The valid entries are 1 2 3 4 6 5 7 0 -2 1: sum 27, sum of squares 145, ten of them.
        assert self.variant(masked_mean)(X, MASK) == pytest.approx(2.7, rel=1e-6)
        assert self.variant(masked_var)(X, MASK) == pytest.approx(14.5 - 2.7**2, rel=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_whitening_by_hand(self):
        x, mask = np.array([1.0, 2.0, 77.0, 3.0, 4.0]), np.array([1, 1, 0, 1, 1], bool)
        scale = 1 / np.sqrt(1.25)  # the mean is 2.5, the population variance 1.25
        centred = np.array([-1.5, -0.5, 0, 0.5, 1.5])
        np.testing.assert_allclose(self.variant(masked_whiten)(x, mask), centred * scale, rtol=1e-6)
        keeps_mean = self.variant(masked_whiten, static_argnames="shift_mean")
        np.testing.assert_allclose(
            keeps_mean(x, mask, shift_mean=False),
            np.where(mask, centred * scale + 2.5, 0),
            rtol=1e-6,
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_weights_replace_the_count(self):
        quarters = np.where(MASK, 0.25, np.nan)  # of what is not valid, nothing is read
        assert self.variant(masked_mean)(X, MASK, weights=quarters) == pytest.approx(27 / 4)
        rows = np.array([[1.0], [0.0], [2.0]]) * np.ones(SHAPE)  # sums of 6, 10 and 11
        assert self.variant(masked_mean)(X, MASK, weights=rows) == pytest.approx(6 + 2 * 11)


@quick
@given(numbers, masks)
def test_agree_with_numpy_on_the_valid_entries(x, mask):
    valid = x[mask].astype(np.float64) if mask.any() else np.zeros(1)
    np.testing.assert_allclose(masked_mean(x, mask), valid.mean(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(masked_var(x, mask), valid.var(), rtol=1e-5, atol=1e-5)
    for shift_mean in (True, False):
        expected = (valid - valid.mean()) / np.sqrt(valid.var() + 1e-8)
        expected += 0 if shift_mean else valid.mean()
        whitened = np.asarray(masked_whiten(x, mask, shift_mean=shift_mean))
        assert (whitened[~mask] == 0).all()
        if mask.any():
            np.testing.assert_allclose(whitened[mask], expected, rtol=2e-4, atol=2e-4)


@quick
@given(numbers, masks, st.permutations(range(SHAPE[0])))
def test_micro_batches_add_up(x, mask, order):
    weights = np.full(SHAPE, 1 / max(mask.sum(), 1), np.float32)
    parts = [masked_mean(x[i], mask[i], weights=weights[i]) for i in order]
    np.testing.assert_allclose(sum(parts), masked_mean(x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1000.1, 3e7])
def test_whitening_a_constant_gives_zeros(constant):
    x = np.full((40, 50), constant, np.float32)
    mask = np.random.default_rng(0).random(x.shape) < 0.7
    np.testing.assert_allclose(masked_whiten(x, mask), 0, atol=1e-3)


def test_variance_does_not_cancel_far_from_zero():
    noise = np.random.default_rng(0).normal(size=(40, 50))
    x = (noise + 10_000).astype(np.float32)
    expected = x.astype(np.float64).var()
    assert masked_var(x, np.ones(x.shape, bool)) == pytest.approx(expected, rel=1e-5)


def test_nothing_valid_is_zero():
    nothing = np.zeros(SHAPE, bool)
    x = np.full(SHAPE, np.nan, np.float32)
    assert masked_mean(x, nothing) == 0
    assert masked_mean(x, nothing, weights=x) == 0
    assert masked_var(x, nothing) == 0
    assert (masked_whiten(x, nothing) == 0).all()


@pytest.mark.parametrize(
    "function",
    [masked_mean, masked_var, masked_whiten, lambda x, m: masked_whiten(x, m, shift_mean=False)],
    ids=["mean", "var", "whiten", "scale"],
)
def test_garbage_reaches_neither_value_nor_gradient(function):
    def loss(x):
        weights = jnp.arange(15.0).reshape(SHAPE)
        return jnp.sum(weights * jnp.exp(function(x, MASK) / 10))

    clean, dirty = np.where(MASK, X, 0), np.where(MASK, X, GARBAGE)
    np.testing.assert_array_equal(function(clean, MASK), function(dirty, MASK))
    gradient = jax.grad(loss)(jnp.asarray(dirty))
    np.testing.assert_array_equal(gradient, jax.grad(loss)(jnp.asarray(clean)))
    assert (gradient[~MASK] == 0).all()
    assert (gradient[MASK] != 0).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_arithmetic_is_float32_whatever_comes_in(dtype):
    x = jnp.asarray(X, dtype)
    for function in (masked_mean, masked_var, masked_whiten):
        result = function(x, MASK)
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, function(X, MASK))


def test_a_long_bfloat16_sum_keeps_its_small_terms():
    ones = jnp.ones((64, 512), jnp.bfloat16)
    assert masked_mean(ones, jnp.ones(ones.shape, bool)) == 1


def test_masks_of_numbers_mean_the_same():
    for dtype in (np.int8, np.float32):
        np.testing.assert_array_equal(masked_whiten(X, MASK.astype(dtype)), masked_whiten(X, MASK))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(AssertionError, match="shape"):
        inspect.unwrap(zero_invalid)(X, MASK[:, :4])
