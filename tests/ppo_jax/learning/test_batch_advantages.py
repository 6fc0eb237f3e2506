"""Every choice of `advantage`, from rewards to a batch, against loops in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithm import no_moments
from ppo_jax.config import PPOConfig
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.batch import Controls, make_batch
from ppo_jax.learning.response_outputs import ResponseOutputs
from qwen_env import mdp

B, GROUP, P, T = 8, 4, 2, 6
LENGTHS = np.array([6, 4, 3, 1, 5, 6, 2, 4])
MASK = np.arange(T) < LENGTHS[:, None]
KL_COEF = 0.3
compiled = jax.jit(
    make_batch,
    static_argnames="config",
    compiler_options={"xla_backend_optimization_level": 0},
)


def batch_of(config: PPOConfig, score: np.ndarray | None = None):
    """(prepared, token rewards, values, log-probabilities of rollout and learner)."""
    rng = np.random.default_rng(0)
    drawn, learner, reference, values = np.where(MASK, -np.abs(rng.normal(size=(4, B, T))), 0)
    score = rng.normal(size=B).astype(np.float32) if score is None else score
    learner = np.where(MASK, drawn + 0.3 * rng.normal(size=(B, T)), 0)
    state = mdp.State(
        tokens=rng.integers(0, 50, (B, P + T)),
        prompt_length=np.full(B, P),
        length=P + LENGTHS,
        terminated=np.ones(B, bool),
        truncated=np.zeros(B, bool),
    )
    as_float = (x.astype(np.float32) for x in (drawn, learner, reference, values))
    drawn, learner, reference, values = as_float
    has_values = config.has_value_function
    old = ResponseOutputs(
        learner,
        np.zeros((B, T)),
        values if has_values else None,
        np.zeros(B) if has_values else None,
    )
    prepared = compiled(
        Rollout(state, drawn),
        score,
        old,
        reference,
        Controls(jnp.float32(KL_COEF), no_moments()),
        config=config,
    )
    used = drawn if config.old_logprobs == "rollout" else learner
    np.testing.assert_array_equal(prepared.batch.logprobs, used)
    rewards = np.where(MASK, -KL_COEF * (used.astype(np.float64) - reference), 0)
    rewards[np.arange(B), LENGTHS - 1] += score
    return prepared, rewards, values, drawn, learner


def config(**changes) -> PPOConfig:
    plain = {"completions_per_prompt": GROUP, "advantage_whitening": "none", "kl_coef": KL_COEF}
    return PPOConfig(batch_size=B, **(plain | changes))


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """Of one row, as a double sum: A_t = sum over k of (gamma lambda)^k delta_(t+k)."""
    following = np.append(values[1:], 0.0)
    delta = rewards + gamma * following - values
    steps = range(len(delta))
    return np.array(
        [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in steps[t:]) for t in steps]
    )


def rows(advantages: np.ndarray) -> list[np.ndarray]:
    assert not np.asarray(advantages)[~MASK].any()
    return [np.asarray(row)[:n] for row, n in zip(advantages, LENGTHS, strict=True)]


@pytest.mark.parametrize("old_logprobs", ["learner", "rollout"])
def test_answers_compared_with_each_other(old_logprobs):
    for name in ("group", "leave_one_out"):
        prepared, rewards, *_ = batch_of(config(advantage=name, old_logprobs=old_logprobs))
        returns = rewards.sum(1).reshape(-1, GROUP)
        centred = returns - returns.mean(1, keepdims=True)
        scale = 1 / (returns.std(1, ddof=1, keepdims=True) + 1e-6) if name == "group" else 4 / 3
        expected = np.broadcast_to((centred * scale).reshape(B, 1), (B, T))
        for row, wanted in zip(rows(prepared.batch.advantages), expected, strict=True):
            np.testing.assert_allclose(row, wanted[: len(row)], atol=2e-5)
        assert prepared.batch.values is prepared.batch.returns is prepared.tokens.values is None
        assert not [metric for metric in prepared.metrics if metric.startswith("value/")]


def test_answers_compared_with_the_batch():
    """REINFORCE++: discounted rewards to go, whitened over the batch."""
    changes = {"advantage": "reinforce_plus_plus", "gamma": 0.9, "advantage_whitening": None}
    prepared, rewards, *_ = batch_of(config(**changes))
    to_go = [gae(r[:n], np.zeros(n), 0.9, 1.0) for r, n in zip(rewards, LENGTHS, strict=True)]
    every = np.concatenate(to_go)
    expected = (every - every.mean()) / every.std()
    np.testing.assert_allclose(np.concatenate(rows(prepared.batch.advantages)), expected, atol=2e-5)


def test_lambdas_of_the_policy_and_of_the_critic():
    """λ = 1 - 1 / (α l) for the advantages, and 1 for the returns, which are then the rewards to
    come, whatever the values are."""
    changes = {"gae_lambda_alpha": 0.5, "critic_gae_lambda": 1.0}
    prepared, rewards, values, *_ = batch_of(config(**changes))
    for i, n in enumerate(LENGTHS):
        expected = gae(rewards[i, :n], values[i, :n], 1.0, max(1 - 1 / (0.5 * n), 0))
        np.testing.assert_allclose(prepared.batch.advantages[i, :n], expected, atol=2e-5)
        to_go = np.cumsum(rewards[i, :n][::-1])[::-1]
        np.testing.assert_allclose(prepared.batch.returns[i, :n], to_go, atol=2e-5)


def test_truncated_importance_sampling_and_the_kl_of_the_rollout():
    plain, *_ = batch_of(config())
    capped, _, _, drawn, learner = batch_of(config(importance_cap=1.2))
    ratio = np.exp(learner - drawn)
    assert (ratio[MASK] > 1.2).any()
    expected = np.asarray(plain.batch.advantages) * np.minimum(ratio, 1.2)
    np.testing.assert_allclose(capped.batch.advantages, expected, atol=1e-6)
    k3 = ratio - 1 - np.log(ratio)
    np.testing.assert_allclose(capped.metrics["rollout/kl"], k3[MASK].mean(), rtol=1e-4)


@pytest.mark.parametrize("whitening", ["batch", "none"])
def test_groups_without_a_difference(whitening):
    """They are counted; if they are dropped, the rest is learnt from as if they were not there."""
    score = np.array([1, 1, 1, 1, 0, 2, 0, 0], np.float32)
    kept = np.repeat([False, True], GROUP)
    for drops in (False, True):
        changes = {"drop_equal_groups": drops, "advantage_whitening": whitening}
        prepared, rewards, values, *_ = batch_of(config(**changes), score)
        assert prepared.metrics["objective/equal_groups_fraction"] == 0.5
        np.testing.assert_array_equal(prepared.batch.mask, MASK & kept[:, None] if drops else MASK)
        np.testing.assert_allclose(prepared.metrics["rollout/length_mean"], LENGTHS.mean())
    advantages = np.concatenate(
        [gae(rewards[i, :n], values[i, :n], 1.0, 0.95) for i, n in enumerate(LENGTHS) if kept[i]]
    )
    if whitening == "batch":
        advantages = (advantages - advantages.mean()) / advantages.std()
    learnt = np.asarray(prepared.batch.advantages)[np.asarray(prepared.batch.mask)]
    np.testing.assert_allclose(learnt, advantages, atol=2e-5)


def test_a_batch_of_equals_alone_teaches_nothing(learner_of, network, rules, finished):
    changes = {"advantage": "group", "completions_per_prompt": 2, "drop_equal_groups": True}
    without_values = {"gae_lambda": 0.95, "gamma": 1.0, "value_coef": 0.1, "kl_coef": 0.0}
    optimizer = {"weight_decay": 0.0}
    learner = learner_of(network, rules, **changes, **without_values, **optimizer)
    prepared = learner.prepare(finished, np.ones(4, np.float32))
    state, metrics, _ = learner.update(prepared.batch)
    assert metrics["update/nonfinite"] == 0
    chex.assert_trees_all_equal(state.params, learner.start.params)


def test_without_values_the_value_head_stays_as_it_is(learner_of, network, rules, finished):
    changes = {"advantage": "leave_one_out", "completions_per_prompt": 2, "ratio_level": "sequence"}
    without_values = {"gae_lambda": 0.95, "gamma": 1.0, "value_coef": 0.1}
    learner = learner_of(network, rules, **changes, **without_values, weight_decay=0.0)
    batch = learner.prepare(finished, np.array([0, 1, 2, 4], np.float32)).batch
    state, metrics, _ = learner.update(batch)
    assert "value/loss" not in metrics
    before, after = learner.start.params, state.params
    for part in ("weight", "bias"):
        np.testing.assert_array_equal(after["value_head"][part], before["value_head"][part])
    assert (after["backbone"]["embed_tokens"][...] != before["backbone"]["embed_tokens"][...]).any()
