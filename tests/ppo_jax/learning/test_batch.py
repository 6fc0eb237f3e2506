"""From scores to a batch, against a plain loop in NumPy: every knob of rewards and advantages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithm import ADVANTAGE_EDGES, no_moments
from ppo_jax.config import PPOConfig
from ppo_jax.generation.rollout import Rollout
from ppo_jax.learning.batch import Controls, make_batch
from ppo_jax.learning.metrics import fetch
from ppo_jax.learning.response_outputs import ResponseOutputs
from qwen_env import mdp

P, T = 3, 8
LENGTHS = np.array([8, 8, 3, 1, 5, 8, 2])
TRUNCATED = np.array([True, False, False, False, False, True, False])
B = len(LENGTHS)
MASK = np.arange(T) < LENGTHS[:, None]
CONFIG = PPOConfig(batch_size=B, kl_coef=0.3, gamma=0.9, gae_lambda=0.8)
# Compiled without LLVM's optimizer: a third less time, and nothing here is large.
compiled = jax.jit(
    make_batch,
    static_argnames="config",
    compiler_options={"xla_backend_optimization_level": 0},
)


def random_episodes(seed=0):
    """(rollout, score, old, ref_logprobs); what lies beyond the responses is garbage."""
    rng = np.random.default_rng(seed)

    def ragged(shape=(B, T)):
        return np.where(MASK, rng.normal(size=shape), np.nan).astype(np.float32)

    prompt_length = rng.integers(1, P + 1, B)
    state = mdp.State(
        tokens=rng.integers(0, 50, (B, P + T)),
        prompt_length=prompt_length,
        length=prompt_length + LENGTHS,
        terminated=~TRUNCATED,
        truncated=TRUNCATED,
    )
    old = ResponseOutputs(
        logprobs=-np.abs(ragged()),
        entropy=np.abs(ragged()),
        values=ragged(),
        # Behind a response that ended by itself, nothing may be looked at.
        last_value=np.where(TRUNCATED, rng.normal(size=B), np.nan).astype(np.float32),
    )
    drawn = np.where(MASK, old.logprobs + 1e-3 * rng.random((B, T)), 0).astype(np.float32)
    score = rng.normal(1, 2, B).astype(np.float32)
    return Rollout(state, drawn), score, old, old.logprobs + 0.5 * ragged()


def controls(kl_coef=0.3):
    return Controls(jnp.float32(kl_coef), no_moments())


def whitened(x, keep_mean=False):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-8) + keep_mean * x.mean()


def numpy_loop(score, old, ref_logprobs, config, kl_coef, earlier_scores=()):
    """Advantages and returns of the valid tokens, a list a row, in float64."""
    payment = score.astype(np.float64)
    if config.scale_scores:
        payment = payment / np.concatenate([score, *earlier_scores]).astype(np.float64).std()
    if config.score_clip is not None:
        payment = np.minimum(np.maximum(payment, -config.score_clip), config.score_clip)
    cut = TRUNCATED & (config.length_limit == "bootstrap")
    rewards = []
    for row, steps in enumerate(LENGTHS):
        k1 = (old.logprobs[row] - ref_logprobs[row])[:steps].astype(np.float64)
        kl = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1}[config.kl_penalty]
        rewards.append(-kl_coef * kl)
        if not cut[row]:
            rewards[row][-1] += payment[row]
    paid = sum(map(np.sum, rewards)) / B
    if config.whiten_rewards:
        scaled = whitened(np.concatenate(rewards), keep_mean=True)
        rewards = np.split(scaled, np.cumsum(LENGTHS)[:-1])
    advantages, returns = [], []
    for row, steps in enumerate(LENGTHS):
        values = old.values[row, :steps].astype(np.float64)
        next_value, advantage, backwards = old.last_value[row] if cut[row] else 0.0, 0.0, []
        for t in reversed(range(steps)):
            delta = rewards[row][t] + config.gamma * next_value - values[t]
            advantage = delta + config.gamma * config.gae_lambda * advantage
            next_value = values[t]
            backwards.append(advantage)
        advantages.append(np.array(backwards[::-1]))
        returns.append(advantages[-1] + values)
    return np.concatenate(advantages), np.concatenate(returns), paid


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_penalty": "k2"},
        {"kl_penalty": "k3", "advantage_whitening": "none"},
        {"scale_scores": True},
        {"score_clip": 1.0},
        {"whiten_rewards": True, "advantage_whitening": "minibatch"},
        {"length_limit": "bootstrap", "advantage_whitening": "none"},
        {
            "kl_penalty": "k3",
            "scale_scores": True,
            "score_clip": 0.5,
            "whiten_rewards": True,
            "length_limit": "bootstrap",
        },
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_equals_a_numpy_loop(changes):
    config = dataclasses.replace(CONFIG, **changes)
    rollout, score, old, ref_logprobs = random_episodes()
    batch, _, metrics, distributions, _ = compiled(
        rollout, score, old, ref_logprobs, controls(), config=config
    )
    advantages, returns, paid = numpy_loop(score, old, ref_logprobs, config, 0.3)
    for array in batch:
        assert array is None or np.isfinite(np.asarray(array)).all()
    np.testing.assert_array_equal(batch.mask, MASK)
    expected = whitened(advantages) if config.whitening == "batch" else advantages
    np.testing.assert_allclose(np.asarray(batch.advantages)[MASK], expected, atol=2e-5)
    np.testing.assert_allclose(np.asarray(batch.returns)[MASK], returns, atol=2e-5)
    np.testing.assert_allclose(metrics["objective/reward"], paid, atol=1e-5)
    histogram, _ = np.histogram(whitened(advantages), ADVANTAGE_EDGES)
    np.testing.assert_array_equal(distributions["advantage"], histogram)
    for name in ("advantages", "returns", "logprobs", "values"):
        assert not np.asarray(getattr(batch, name))[~MASK].any(), name


def test_metrics_and_distributions_by_position():
    rollout, score, old, ref_logprobs = random_episodes(1)
    short = (np.arange(T) < 6) & MASK  # no row reaches the last two places
    state = rollout.state._replace(
        length=rollout.state.prompt_length + np.minimum(LENGTHS, 6), terminated=np.ones(B, bool)
    )
    batch, _, metrics, distributions, _ = compiled(
        rollout._replace(state=state), score, old, ref_logprobs, controls(), config=CONFIG
    )
    kl = np.where(short, old.logprobs - ref_logprobs, 0)
    returns, values = np.asarray(batch.returns)[short], old.values[short]
    metrics, distributions = fetch(metrics, distributions)
    for name, expected in {
        "objective/score": score.mean(),
        "objective/score_std": score.std(),
        "objective/kl": kl.sum(1).mean(),
        "objective/kl_coef": 0.3,
        "objective/kl_clamped_fraction": 0.0,
        "policy/entropy": old.entropy[short].mean(),
        "value/mean": values.mean(),
        "value/explained_variance": 1 - (returns - values).var() / returns.var(),
        "rollout/length_mean": np.minimum(LENGTHS, 6).mean(),
        "rollout/eos_rate": 1.0,
        "rollout/logprob_gap_max": np.abs(rollout.logprobs - old.logprobs)[short].max(),
    }.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=2e-4, err_msg=name)
    for name, x in (("kl_by_position", kl), ("entropy_by_position", old.entropy)):
        for t in range(T):
            there = short[:, t]
            expected = x[there, t].mean() if there.any() else np.nan
            np.testing.assert_allclose(distributions[name][t], expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(distributions["kl_by_position"][6:]).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -30.0])
def test_of_constant_returns_the_explained_variance_is_undefined(value):
    """With γ = λ = 1 and no penalty, each return is the score. No program makes a NaN for it."""
    rollout, score, old, _ = random_episodes(1)
    with jax.debug_nans(True):
        result = compiled(
            rollout, np.full_like(score, value), old, old.logprobs, controls(), config=PAYMENT
        )
        apart = compiled(
            rollout, score - score.mean(), old, old.logprobs, controls(), config=PAYMENT
        )
    name = "value/explained_variance"
    assert np.isnan(fetch(result.metrics, {})[0][name])
    returns = np.repeat(score - score.mean(), LENGTHS)
    expected = 1 - (returns - old.values[MASK]).var() / returns.var()
    assert fetch(apart.metrics, {})[0][name] == pytest.approx(expected, rel=1e-4)


def test_tokens_whose_penalty_is_clamped_are_counted():
    """Those that the reference thinks e¹⁰ times as probable as the policy, where k3 is in use."""
    rollout, score, old, _ = random_episodes(1)
    further = np.where(np.arange(T) == 1, 10.5, 9.5) - 30 * (np.arange(T) == 2)
    for estimator in ("k1", "k2", "k3"):
        config = dataclasses.replace(CONFIG, kl_penalty=estimator)
        result = compiled(rollout, score, old, old.logprobs + further, controls(), config=config)
        expected = MASK[:, 1].sum() / MASK.sum() if estimator == "k3" else 0
        share = result.metrics["objective/kl_clamped_fraction"]
        assert share == pytest.approx(expected, rel=1e-6)
        assert expected > 0 or estimator != "k3"


def test_bootstrapping_changes_the_truncated_rows_alone():
    config = dataclasses.replace(CONFIG, advantage_whitening="none")
    bootstraps = dataclasses.replace(config, length_limit="bootstrap")
    rollout, score, old, ref_logprobs = random_episodes(2)

    def advantages(config, **changes):
        changed = old._replace(**changes)
        batch = compiled(rollout, score, changed, ref_logprobs, controls(), config=config).batch
        return np.asarray(batch.advantages)

    scored, bootstrapped = advantages(config), advantages(bootstraps)
    np.testing.assert_array_equal(scored[~TRUNCATED], bootstrapped[~TRUNCATED])
    assert (scored[TRUNCATED] != bootstrapped[TRUNCATED]).all()
    # What stands for the score is γ times the value of the state in which the row was cut off:
    # with the score in its place, both are one.
    same = advantages(bootstraps, last_value=np.where(TRUNCATED, score / config.gamma, np.nan))
    np.testing.assert_allclose(same, scored, atol=1e-5)
    # One more in that value is γ (γλ)ᵏ more for the token k steps before the end.
    more = advantages(bootstraps, last_value=old.last_value + 1) - bootstrapped
    steps_left = (LENGTHS[:, None] - 1 - np.arange(T))[TRUNCATED]
    expected = config.gamma * (config.gamma * config.gae_lambda) ** steps_left
    np.testing.assert_allclose(more[TRUNCATED], expected, atol=1e-5)


def last_rewards(config, score, state):
    """What was paid at each row's last token, with γ = λ = 1 and no KL: its return there."""
    rollout, _, old, _ = random_episodes(3)
    result = compiled(rollout, np.float32(score), old, old.logprobs, state, config=config)
    last = np.asarray(result.batch.returns)[np.arange(B), LENGTHS - 1]
    return last, result.controls


PAYMENT = PPOConfig(batch_size=B, gamma=1.0, gae_lambda=1.0)


def test_scores_are_scaled_first_and_clipped_then():
    score = np.array([0, 0, 0, 0, 0, 0, 7.0])
    deviation = score.std()  # 7 √6 / 7
    for changes, expected in (
        ({}, 7.0),
        ({"score_clip": 2.0}, 2.0),
        ({"scale_scores": True}, 7 / deviation),
        ({"scale_scores": True, "score_clip": 2.0}, 2.0),
        ({"scale_scores": True, "score_clip": 5.0}, 7 / deviation),
    ):
        config = dataclasses.replace(PAYMENT, **changes)
        last, _ = last_rewards(config, score, controls())
        np.testing.assert_allclose(last, [*[0] * 6, expected], rtol=1e-5, atol=1e-5)
    last, _ = last_rewards(dataclasses.replace(PAYMENT, score_clip=2.0), -score, controls())
    assert last[-1] == pytest.approx(-2.0, abs=1e-5)


def test_scaling_is_by_all_scores_so_far():
    config = dataclasses.replace(PAYMENT, scale_scores=True)
    rng = np.random.default_rng(0)
    seen, state = [], controls()
    for scale in (1.0, 10.0, 0.1):
        score = rng.normal(5, scale, B)
        seen.append(score)
        last, state = last_rewards(config, score, state)
        np.testing.assert_allclose(last, score / np.concatenate(seen).std(), rtol=1e-4)
    assert state.score_moments.number == 3 * B


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-5, 1e-3])
def test_scores_that_rounding_sets_apart_are_not_scaled(apart):
    """They have no deviation to be divided by: 0.5 would become hundreds of thousands."""
    config = dataclasses.replace(PAYMENT, scale_scores=True)
    score = 0.5 + apart * np.linspace(-1, 1, B)
    last, state = last_rewards(config, score, controls())
    np.testing.assert_allclose(last, score, atol=1e-5)
    # Once they differ, all of them are.
    more = np.linspace(0, 1, B)
    last, _ = last_rewards(config, more, state)
    np.testing.assert_allclose(last, more / np.concatenate([score, more]).std(), rtol=1e-4)


def test_whitened_rewards_have_variance_one_and_keep_their_mean():
    rollout, score, old, ref_logprobs = random_episodes(4)

    def rewards(config):
        batch = compiled(rollout, score, old, ref_logprobs, controls(), config=config).batch
        returns = np.pad(np.asarray(batch.returns, np.float64), ((0, 0), (0, 1)))
        return (returns[:, :-1] - returns[:, 1:])[MASK]  # γ = λ = 1

    plain = rewards(PAYMENT)
    white = rewards(dataclasses.replace(PAYMENT, whiten_rewards=True))
    assert white.mean() == pytest.approx(plain.mean(), abs=1e-5)
    assert white.std() == pytest.approx(1, abs=1e-5)
    assert abs(plain.mean()) > 0.01 and abs(plain.std() - 1) > 0.05
    np.testing.assert_allclose(
        white - white.mean(), (plain - plain.mean()) / plain.std(), atol=1e-5
    )


def test_the_coefficient_adapts_to_the_batchs_kl_and_pays_from_the_next_batch_on():
    adaptive = dataclasses.replace(CONFIG, kl_target=2.0, kl_horizon=100)
    episodes = random_episodes(5)
    fixed = compiled(*episodes, controls(), config=CONFIG)
    adapted = compiled(*episodes, controls(), config=adaptive)
    assert fixed.controls.kl_coef == np.float32(0.3)
    np.testing.assert_array_equal(adapted.batch.advantages, fixed.batch.advantages)
    kl = float(fixed.metrics["objective/kl"])
    expected = 0.3 * (1 + np.clip(kl / 2.0 - 1, -0.2, 0.2) * B / 100)
    assert adapted.controls.kl_coef == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(0.3, rel=1e-3)
    again = compiled(*episodes, adapted.controls, config=adaptive)
    assert again.metrics["objective/kl_coef"] == adapted.controls.kl_coef
    paid = episodes[1].mean() - expected * kl
    assert again.metrics["objective/reward"] == pytest.approx(paid, rel=1e-4)
