"""Advantages without values, against verl's published formulas in PyTorch and an exact bandit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import (
    clipped_policy_loss,
    group_advantages,
    is_in_equal_group,
    leave_one_out_advantages,
    length_adaptive_lambda,
)

ESTIMATORS = {"group": group_advantages, "leave_one_out": leave_one_out_advantages}


def verl(name: str, returns: np.ndarray, group_size: int) -> list[float]:
    """`compute_grpo_outcome_advantage` and `compute_rloo_outcome_advantage` of verl 0.5, a loop
    over the episodes as theirs is."""
    scores = torch.tensor(returns)
    advantages = []
    for i in range(len(scores)):
        of_prompt = scores[i // group_size * group_size :][:group_size]
        if name == "group":
            advantage = (scores[i] - of_prompt.mean()) / (torch.std(of_prompt) + 1e-6)
        else:
            n = group_size
            advantage = scores[i] * n / (n - 1) - of_prompt.mean() * n / (n - 1)
        advantages.append(advantage.item())
    return advantages


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("group_size", [2, 4, 7])
def test_equal_verls(name, group_size):
    returns = np.random.default_rng(group_size).normal(0.3, 2, 5 * group_size)
    advantages = ESTIMATORS[name](returns.astype(np.float32), group_size)
    np.testing.assert_allclose(advantages, verl(name, returns, group_size), atol=2e-6)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), st.integers(2, 5), st.data()
)
def test_what_holds_of_any_returns(scores, group_size, data):
    """Each group's advantages add up to 0; among equals nobody is better, whatever the rounding."""
    returns = np.repeat(np.array(scores, np.float32), group_size)
    for estimate in ESTIMATORS.values():
        np.testing.assert_array_equal(estimate(returns, group_size), np.zeros(len(returns)))
    assert is_in_equal_group(returns, group_size).all()
    odd = data.draw(st.integers(0, len(returns) - 1))
    returns[odd] += max(1e-3, 1e-5 * abs(returns[odd]))
    is_of_odd = np.arange(len(returns)) // group_size == odd // group_size
    np.testing.assert_array_equal(is_in_equal_group(returns, group_size), ~is_of_odd)
    for estimate in ESTIMATORS.values():
        advantages = np.asarray(estimate(returns, group_size))
        np.testing.assert_allclose(advantages.reshape(-1, group_size).sum(1), 0, atol=1e-3)


def test_a_group_of_one_is_refused():
    for estimate in (*ESTIMATORS.values(), is_in_equal_group):
        with pytest.raises(ValueError, match="group_size is 1"):
            estimate(np.ones(4), 1)


def test_leaving_one_out_gives_the_exact_gradient_of_a_bandit():
    """Over all pairs of answers that a prompt may get, with their probabilities; Dr. GRPO's, which
    subtracts the mean of both, gives half of it; GRPO's deviation makes another direction."""
    reward = jnp.array([0.2, 1.0, -0.5, 0.7])
    logits = jnp.array([0.3, -0.4, 0.1, 0.9])
    exact = jax.grad(lambda x: jax.nn.softmax(x) @ reward)(logits)

    def expected(advantages_of):
        total = 0.0
        probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
        for pair in itertools.product(range(4), repeat=2):
            actions = jnp.array(pair)
            advantages = advantages_of(reward[actions])

            def loss(logits, actions=actions, advantages=advantages):
                new = jax.nn.log_softmax(logits)[actions]
                old = jax.lax.stop_gradient(new)
                return clipped_policy_loss(new, old, advantages, jnp.ones(2, bool)).loss

            total -= probabilities[list(pair)].prod() * np.asarray(jax.grad(loss)(logits))
        return total

    np.testing.assert_allclose(
        expected(lambda r: leave_one_out_advantages(r, 2)), exact, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(expected(lambda r: r - r.mean()), exact / 2, rtol=1e-5, atol=1e-7)
    scaled = expected(lambda r: group_advantages(r, 2))
    cosine = scaled @ exact / (np.linalg.norm(scaled) * np.linalg.norm(exact))
    assert 0.5 < cosine < 0.999


def test_the_weights_of_a_length_adaptive_lambda_add_up_to_a_share_of_the_length():
    """1 + λ + λ² + ... = α l, which is what VAPO asks for; one token has nothing to look ahead."""
    lengths = np.array([1, 10, 100, 4000])
    lambdas = np.asarray(length_adaptive_lambda(lengths, 0.5), np.float64)
    np.testing.assert_allclose(1 / (1 - lambdas[1:]), 0.5 * lengths[1:], rtol=1e-3)
    assert lambdas[0] == 0
