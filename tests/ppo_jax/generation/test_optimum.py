"""The best policy for its KL, against closed forms."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import rel_entr, softmax

from ppo_jax.generation.optimum import optimum, optimum_at, share_of_gain


@pytest.mark.parametrize("beta", [0.8, 1.0, 3.0])
def test_of_normal_rewards(beta):
    """exp(r / β) moves N(μ, σ²) by σ² / β, which is σ² / 2 β² nats away, and every other mean by
    what it shares with the reward."""
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=(2, 40, 20_000))
    found = optimum(2 + common, beta, {"gold": 0.8 * common + 0.6 * own})
    assert found.reward == pytest.approx(2 + 1 / beta, abs=0.03)
    assert found.kl == pytest.approx(1 / (2 * beta**2), abs=0.03)
    assert found.others["gold"] == pytest.approx(0.8 / beta, abs=0.03)
    # E[w]² / E[w²] of log-normal weights
    assert found.effective_samples / 20_000 == pytest.approx(np.exp(-1 / beta**2), rel=0.2)


def test_nothing_earns_more():
    """Of all distributions over the six answers to two prompts, by numerical search."""
    rewards = np.array([[0.1, 1.0, -0.4], [0.3, 0.2, 2.0]])
    beta = 0.7

    def objective(logits):
        policy = softmax(logits.reshape(2, 3), axis=1)
        kl = rel_entr(policy, 1 / 3).sum(axis=1)
        return -((policy * rewards).sum(axis=1) - beta * kl).mean()

    best = optimum(rewards, beta)
    found = minimize(objective, np.zeros(6), tol=1e-12)
    assert best.objective() == pytest.approx(-found.fun, abs=1e-8)
    assert optimum(rewards, np.inf).kl == 0
    assert optimum(rewards, np.inf).reward == pytest.approx(rewards.mean())


@pytest.mark.parametrize("kl", [0.1, 0.7, 1.5])
def test_a_kl_is_met(kl):
    rewards = np.random.default_rng(1).normal(size=(5, 64)) * 30
    found = optimum_at(kl, rewards)
    assert found.kl == pytest.approx(kl, rel=1e-6)
    others = [optimum(rewards, found.beta * factor) for factor in (0.9, 1.1)]
    assert others[0].kl > kl > others[1].kl
    assert others[0].reward > found.reward > others[1].reward


def test_what_samples_cannot_tell():
    for rewards, kl in itertools.product(
        (np.ones((2, 8)), np.arange(16.0).reshape(2, 8)), (2.1, 9)
    ):
        with pytest.raises(ValueError, match="cannot be told from 8 samples"):
            optimum_at(kl, rewards)


def test_share():
    assert share_of_gain(1.5, 2.0, 1.0) == 0.5
