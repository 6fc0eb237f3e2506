import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithm import kl_estimate, token_rewards

SCORE = np.array([10.0, 20.0, 30.0], np.float32)
MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
LOGPROBS = np.array([[-1, -2, -3, 7], [7, -1, -1, 7], [7, 7, 7, 7]], np.float32)
REF_LOGPROBS = np.array([[-2, -2, -1, 9], [9, -3, -2, 9], [9, 9, 9, 9]], np.float32)


class GoldenTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        # log π - log π_ref is (1, 0, -2) and (2, 1); β = 1/2; the third row has no token
        function = self.variant(token_rewards, static_argnames=("estimator", "level"))
        arrays = (SCORE, LOGPROBS, REF_LOGPROBS, MASK)
        np.testing.assert_array_equal(
            function(*arrays, kl_coef=0.5),
            [[-0.5, 0, 10 + 1, 0], [0, -1, 20 - 0.5, 0], [0, 0, 0, 0]],
        )
        np.testing.assert_array_equal(
            function(*arrays, kl_coef=0.5, estimator="k2"),
            [[-0.25, 0, 10 - 1, 0], [0, -1, 20 - 0.25, 0], [0, 0, 0, 0]],
        )
        np.testing.assert_array_equal(
            function(*arrays, kl_coef=0.5, level="sequence"),
            [[0, 0, 10 + 0.5, 0], [0, 0, 20 - 1.5, 0], [0, 0, 0, 0]],
        )
        np.testing.assert_array_equal(
            function(*arrays, kl_coef=0.0), [[0, 0, 10, 0], [0, 0, 20, 0], [0, 0, 0, 0]]
        )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_episode_earns_its_score_less_its_kl(estimator):
    rng = np.random.default_rng(0)
    logprobs, ref_logprobs = -rng.exponential(size=(2, 5, 8)).astype(np.float32)
    score = rng.normal(size=5).astype(np.float32)
    mask = rng.random((5, 8)) < 0.6
    mask[:, 3] = True
    rewards = token_rewards(score, logprobs, ref_logprobs, mask, kl_coef=0.3, estimator=estimator)
    kl = np.asarray(kl_estimate(logprobs, ref_logprobs, estimator))
    np.testing.assert_allclose(
        rewards.sum(1), score - 0.3 * np.where(mask, kl, 0).sum(1), rtol=1e-5, atol=1e-5
    )


def test_the_best_policys_returns_are_the_same_for_all_answers():
    """Of two tokens each, by Bayes' rule from π*(y) = π_ref(y) exp(r(y) / β) / Z, listed."""
    rng, beta = np.random.default_rng(0), 0.4
    first, second = (rng.dirichlet(np.ones(5), size=size) for size in (1, 5))
    score = rng.normal(size=(5, 5))
    joint = first.T * second * np.exp(score / beta)
    partition = joint.sum()
    joint /= partition
    best = np.stack([joint.sum(1)[:, None] + 0 * joint, joint / joint.sum(1, keepdims=True)], -1)
    reference = np.stack([first.T + 0 * joint, second], -1)
    logprobs, ref_logprobs = (np.log(x).reshape(25, 2) for x in (best, reference))

    def returns(level):
        mask = np.ones((25, 2), bool)
        arrays = score.ravel(), logprobs, ref_logprobs, mask
        rewards = np.asarray(token_rewards(*arrays, kl_coef=beta, level=level))
        return rewards[:, ::-1].cumsum(1)[:, ::-1]

    np.testing.assert_allclose(returns("sequence"), beta * np.log(partition), atol=1e-5)
    assert returns("token")[:, 1].std() > 0.1  # β log Z of what is left: another after each token


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_garbage_reaches_neither_value_nor_gradient(garbage):
    def value_and_gradients(fill):
        score = np.where(MASK.any(1), SCORE, fill)
        arrays = (score, jnp.where(MASK, LOGPROBS, fill), jnp.where(MASK, REF_LOGPROBS, -fill))

        def loss(*arrays):
            return jnp.sum(token_rewards(*arrays, MASK, kl_coef=0.1, estimator="k3") ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)

    result = value_and_gradients(garbage)
    chex.assert_tree_all_finite(result)
    chex.assert_trees_all_equal(result, value_and_gradients(0.0))


def test_whole_number_scores_do_not_floor_the_rewards():
    rewards = token_rewards(
        SCORE.astype(np.int32), LOGPROBS / 8, REF_LOGPROBS / 8, MASK, kl_coef=0.5
    )
    assert rewards.dtype == jnp.float32
    assert rewards[0, 0] == -1 / 16


def test_the_coefficient_can_be_traced_without_recompiling():
    traced_once = jax.jit(chex.assert_max_traces(token_rewards, 1))
    for kl_coef in (0.1, 0.2, 0.0):
        np.testing.assert_allclose(
            traced_once(SCORE, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=kl_coef),
            token_rewards(SCORE, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=kl_coef),
            rtol=1e-6,
        )


def test_a_wrong_shape_is_refused():
    with pytest.raises(AssertionError, match="shape"):
        inspect.unwrap(token_rewards)(SCORE[:2], LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1)
