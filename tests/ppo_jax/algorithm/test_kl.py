import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from ppo_jax.algorithm import adapted_kl_coef, approx_kl, is_clamped, kl_estimate, token_weights

VOCABULARY = 7
compiled_adapted = jax.jit(adapted_kl_coef)
quick = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 100_000)


def random_pair(seed, distance=1.0):
    """Two categorical distributions, as float64 log-probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=VOCABULARY)
    other = logits + distance * rng.normal(size=VOCABULARY)
    return [x - np.log(np.exp(x).sum()) for x in (logits, other)]


def exact_kl(log_p, log_q):
    return float(entropy(np.exp(log_p), np.exp(log_q)))


def expectation(log_p, log_q, estimator):
    """E_p of the estimate, summed over the whole vocabulary."""
    return float(np.sum(np.exp(log_p) * np.asarray(kl_estimate(log_p, log_q, estimator))))


class GoldenTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_one_token_by_hand(self):
        # p = 1/2, q = 1/4: k1 = log 2, the ratio q/p = 1/2
        log2 = np.log(2.0)
        expected = {
            "k1": log2,
            "k2": log2**2 / 2,
            "k3": 0.5 - 1 + log2,
            "reference": 0.5 * log2,
        }
        for estimator, value in expected.items():
            function = self.variant(lambda p, q, e=estimator: kl_estimate(p, q, e))
            result = function(np.log([0.5]), np.log([0.25]))
            assert result.dtype == jnp.float32
            np.testing.assert_allclose(result, [value], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_mean_over_valid_tokens(self):
        old = np.log(np.array([[0.5, 0.5, 0.9], [0.25, 0.1, 0.2]], np.float32))
        new = np.log(np.array([[0.25, 0.5, 0.1], [0.5, 0.7, 0.3]], np.float32))
        mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
        function = self.variant(approx_kl, static_argnames="estimator")
        k1 = (np.log(2) + 0 - np.log(2)) / 3
        k3 = ((0.5 - 1 + np.log(2)) + 0 + (2 - 1 - np.log(2))) / 3
        np.testing.assert_allclose(function(old, new, mask, estimator="k1"), k1, atol=1e-7)
        np.testing.assert_allclose(function(old, new, mask), k3, rtol=1e-6)
        sixths = np.full(mask.shape, 1 / 6)
        np.testing.assert_allclose(function(old, new, mask, weights=sixths), k3 / 2, rtol=1e-6)


@quick
@given(seeds)
def test_k1_and_k3_are_unbiased(seed):
    log_p, log_q = random_pair(seed)
    kl = exact_kl(log_p, log_q)
    assert expectation(log_p, log_q, "k1") == pytest.approx(kl, rel=1e-5, abs=1e-6)
    assert expectation(log_p, log_q, "k3") == pytest.approx(kl, rel=1e-5, abs=1e-6)


@quick
@given(seeds)
def test_reference_form_estimates_minus_the_other_kl(seed):
    """So a stop on `approx_kl > target` cannot be expected to fire, whatever the policies."""
    log_p, log_q = random_pair(seed)
    result = expectation(log_p, log_q, "reference")
    assert result == pytest.approx(-exact_kl(log_q, log_p), rel=1e-5, abs=1e-6)
    assert result <= 0


def test_k2_is_biased_only_in_third_order():
    for seed in range(5):
        biases = []
        for distance in (0.1, 0.05):
            log_p, log_q = random_pair(seed, distance)
            biases.append(expectation(log_p, log_q, "k2") - exact_kl(log_p, log_q))
        assert abs(biases[0]) > 1e-6
        assert biases[0] / biases[1] == pytest.approx(8, rel=0.5)  # halved distance, eighth of bias


def test_k3_varies_less_than_k1_between_near_policies():
    log_p, log_q = random_pair(0, distance=0.1)
    p = np.exp(log_p)
    variance = {}
    for estimator in ("k1", "k3"):
        estimates = np.asarray(kl_estimate(log_p, log_q, estimator))
        variance[estimator] = p @ estimates**2 - (p @ estimates) ** 2
    assert variance["k3"] < variance["k1"] / 20


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "reference"])
def test_sampled_mean_lies_within_its_standard_error(estimator):
    log_p, log_q = random_pair(1)
    actions = np.random.default_rng(0).choice(VOCABULARY, size=(200, 100), p=np.exp(log_p))
    old, new = log_p[actions], log_q[actions]
    mask = np.random.default_rng(1).random(actions.shape) < 0.8
    estimates = np.asarray(kl_estimate(old, new, estimator))[mask]
    error = estimates.std() / np.sqrt(mask.sum())
    sampled = float(approx_kl(old, new, mask, estimator))
    assert sampled == pytest.approx(expectation(log_p, log_q, estimator), abs=4 * error)
    assert error < 0.02


@quick
@given(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32))
def test_k2_and_k3_are_never_negative(log_p, log_q):
    assert kl_estimate(log_p, log_q, "k2") >= 0
    assert kl_estimate(log_p, log_q, "k3") >= 0


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["with_jit", "without_jit"])
def test_k3_keeps_its_digits_for_tiny_changes(transform):
    """exp(x) - 1 - x loses them all near 0, and half of what it loses comes out negative."""
    k1 = np.concatenate([-np.logspace(-12, 1, 5000), np.logspace(-12, 1, 5000)])
    k1 = k1.astype(np.float32)
    estimates = np.asarray(transform(lambda x: kl_estimate(x, jnp.zeros_like(x), "k3"))(k1))
    exact = np.expm1(-k1.astype(np.float64)) + k1
    assert (estimates >= 0).all()
    np.testing.assert_allclose(estimates, exact, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("k1", [-10.0, -10.5, -30.0, -1e4])
def test_what_is_exponentiated_is_clamped(k1):
    """For an action that q likes and that p all but never chooses; the other side is left alone."""
    log_p, log_q = np.float32([k1, -k1, 0.0]), np.zeros(3, np.float32)
    k3 = kl_estimate(log_p, log_q, "k3")
    np.testing.assert_allclose(k3, [np.exp(10) - 11, np.exp(k1) - 1 - k1, 0], rtol=1e-5)
    reference = kl_estimate(log_p, log_q, "reference")
    np.testing.assert_allclose(reference, [-10 * np.exp(10), -k1 * np.exp(k1), 0], rtol=1e-4)
    np.testing.assert_array_equal(kl_estimate(log_p, log_q, "k1"), log_p)
    for estimator in ("k1", "k2", "k3", "reference"):
        acts = k1 < -10 and estimator in ("k3", "reference")
        np.testing.assert_array_equal(is_clamped(log_p, log_q, estimator), [acts, False, False])


@quick
@given(seeds)
def test_of_a_truncated_p_k1_is_unbiased_and_k3_falls_short(seed):
    """By what q gives to the ids that p may not choose: they cannot be seen from p's draws."""
    log_p, log_q = random_pair(seed)
    kept = np.exp(log_p) > np.median(np.exp(log_p))
    log_p = np.where(kept, log_p - np.log(np.exp(log_p)[kept].sum()), -np.inf)
    kl = exact_kl(log_p, log_q)
    assert expectation(log_p[kept], log_q[kept], "k1") == pytest.approx(kl, rel=1e-5, abs=1e-6)
    left_out = np.exp(log_q)[~kept].sum()
    short = kl - expectation(log_p[kept], log_q[kept], "k3")
    assert short == pytest.approx(left_out, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "reference"])
def test_garbage_reaches_neither_value_nor_gradient(estimator):
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 4, 5)).astype(np.float32)
    mask = rng.random((4, 5)) < 0.5

    def value_and_gradients(fill):
        args = (jnp.where(mask, old, fill), jnp.where(mask, new, -fill))
        return jax.value_and_grad(approx_kl, argnums=(0, 1))(*args, mask, estimator)

    result = value_and_gradients(np.resize([np.nan, np.inf, -np.inf, 1e30], mask.shape))
    chex.assert_trees_all_equal(result, value_and_gradients(0.0))
    assert (result[1][1][~mask] == 0).all()
    assert (result[1][1][mask] != 0).all()


def test_micro_batches_add_up():
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 6, 5))
    mask = rng.random((6, 5)) < 0.5
    weights = token_weights(mask)
    parts = [
        approx_kl(*(x[i : i + 2] for x in (old, new, mask)), weights=weights[i : i + 2])
        for i in (0, 2, 4)
    ]
    np.testing.assert_allclose(sum(parts), approx_kl(old, new, mask), rtol=1e-6)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match=r"no KL estimator 'k4'; choose one of k1, k2, k3, ref"):
        inspect.unwrap(kl_estimate)(0.0, 0.0, "k4")


class AdaptiveCoefficientTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        # A target of 6 nats, batches of 100 episodes, a horizon of 1000: steps of a tenth of e
        function = self.variant(
            lambda coef, kl: adapted_kl_coef(coef, kl, target=6.0, num_episodes=100, horizon=1000)
        )
        for kl, error in ((6.0, 0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-3, -0.2)):
            assert function(0.05, kl) == pytest.approx(0.05 * (1 + error / 10), rel=1e-6), kl


def test_the_coefficient_holds_a_kl_that_answers_to_it_at_its_target():
    """A policy whose KL is 1 / (4 β): the fixed point is the β at which that is the target."""
    step = jax.jit(lambda coef, kl: adapted_kl_coef(coef, kl, target=2, num_episodes=1, horizon=10))
    coef = jnp.float32(1.0)
    for _ in range(600):
        coef = step(coef, 1 / (4 * coef))
    assert coef == pytest.approx(1 / 8, rel=1e-3)


@quick
@given(st.floats(1e-3, 10), st.floats(-5, 50), st.floats(0.1, 10), st.integers(1, 256))
def test_a_horizon_of_episodes_moves_the_coefficient_by_a_fifth_at_most(coef, kl, target, batch):
    horizon = 1024
    moved = compiled_adapted(coef, kl, target=target, num_episodes=batch, horizon=horizon)
    largest = 0.2 * batch / horizon
    assert coef * (1 - largest) * (1 - 1e-6) <= moved <= coef * (1 + largest) * (1 + 1e-6)
    assert (moved - coef) * (kl - target) >= -1e-6 * coef  # up if the KL is above, else down
