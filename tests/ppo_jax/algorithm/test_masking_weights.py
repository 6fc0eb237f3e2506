"""What a token counts for in the mean of a minibatch."""

import inspect

import chex
import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import clipped_policy_loss, masked_mean, token_weights

SHAPE = (4, 5)
compiled_weights = jax.jit(token_weights, static_argnames="aggregation")
compiled_mean = jax.jit(masked_mean)
quick = settings(deadline=None, max_examples=40, derandomize=True)
masks = hnp.arrays(bool, SHAPE)


class GoldenTest(chex.TestCase):
    mask = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)

    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        function = self.variant(token_weights, static_argnames="aggregation")
        np.testing.assert_array_equal(
            function(self.mask), [[0.25, 0.25, 0.25, 0], [0, 0.25, 0, 0], [0, 0, 0, 0]]
        )
        # Two rows hold a token: each counts a half, the first one's tokens a third of that.
        np.testing.assert_allclose(
            function(self.mask, aggregation="sequence"),
            [[1 / 6, 1 / 6, 1 / 6, 0], [0, 1 / 2, 0, 0], [0, 0, 0, 0]],
            rtol=1e-6,
        )


@quick
@given(masks, st.integers(0, 10_000))
def test_weighted_means_agree_with_numpy(mask, seed):
    x = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    rows = [row[valid].mean() for row, valid in zip(x, mask, strict=True) if valid.any()]
    expected = {
        "token": x[mask].mean() if mask.any() else 0.0,
        "sequence": np.mean(rows) if rows else 0.0,
    }
    for aggregation, mean in expected.items():
        weights = compiled_weights(mask, aggregation=aggregation)
        assert weights.dtype == np.float32
        assert not np.asarray(weights)[~mask].any()
        np.testing.assert_allclose(np.sum(weights), float(mask.any()), rtol=1e-5)
        np.testing.assert_allclose(compiled_mean(x, mask, weights=weights), mean, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("cut", [[(0, 1), (1, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]])
def test_losses_and_gradients_of_micro_batches_add_up(aggregation, cut):
    rng = np.random.default_rng(0)
    new, old, advantages = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    mask = rng.random(SHAPE) < 0.6
    mask[2] = False  # a row without a token is no row
    weights = token_weights(mask, aggregation)
    differentiate = jax.jit(
        jax.value_and_grad(
            lambda new, *rest, weights: clipped_policy_loss(new, *rest, weights=weights).loss
        )
    )
    whole, gradient = differentiate(new, old, advantages, mask, weights=weights)
    pieces = [
        differentiate(*(x[a:b] for x in (new, old, advantages, mask)), weights=weights[a:b])
        for a, b in cut
    ]
    np.testing.assert_allclose(sum(loss for loss, _ in pieces), whole, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([g for _, g in pieces]), gradient, rtol=1e-6)


def test_one_token_mean_is_plain_masked_mean():
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=SHAPE).astype(np.float32), rng.random(SHAPE) < 0.6
    weighted = masked_mean(x, mask, weights=token_weights(mask))
    np.testing.assert_allclose(weighted, masked_mean(x, mask), rtol=1e-6)


def test_a_mask_that_is_no_matrix_is_refused():
    with pytest.raises(AssertionError, match="rank"):
        inspect.unwrap(token_weights)(np.ones(3, bool))


def test_an_unknown_aggregation_lists_the_others():
    with pytest.raises(ValueError, match="no aggregation 'tokens'; choose one of token, sequence"):
        inspect.unwrap(token_weights)(np.ones(SHAPE, bool), "tokens")
