"""From finished episodes to a batch: what teacher forcing and scoring make of them, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.sampling import pack_bits

B, P, T = 4, 5, 6
RESPONSE_LENGTHS = np.array([6, 1, 4, 3])
MASK = np.arange(T) < RESPONSE_LENGTHS[:, None]
SCORE = np.array([1.0, -0.5, 2.0, 0.25], np.float32)


@pytest.fixture(scope="module")
def full_logits(network):
    """From a state and a backbone to float64 logits [B, S, V] and values [B, S]."""
    graphdef, params = nnx.split(network)
    compiled = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))

    def of(state, backbone=None):
        other = params if backbone is None else nnx.State({**params, "backbone": backbone})
        mask = jnp.arange(P + T) < state.length[:, None]
        return [np.asarray(x, np.float64) for x in compiled(other, state.tokens, mask)]

    return of


def response_logprobs(logits, state, allowed, temperature=1.0):
    """log π of each response token [B, T], normalised over the ids that `allowed` [B, T, V] has."""
    index = np.asarray(state.prompt_length)[:, None] + np.arange(T)
    rows = np.arange(B)[:, None]
    inside = np.minimum(index, P + T - 1)
    masked = np.where(allowed, logits[rows, inside - 1] / temperature, -np.inf)
    log_p = masked - np.log(np.exp(masked).sum(-1, keepdims=True))
    return log_p[rows, np.arange(T), np.asarray(state.tokens)[rows, inside]], log_p


def allowed_ids(rules):
    allowed = np.ones((B, T, rules.vocab_size), bool)
    allowed[..., list(rules.forbidden_token_ids)] = False
    return allowed


def test_equals_a_numpy_loop(full_logits, rules, compiled, finished):
    learner = compiled(advantage_whitening="none")
    ppo = learner.ppo
    batch, _, metrics, _, _ = learner.prepare(finished)
    state = finished.state
    logits, all_values = full_logits(state)
    logprobs, _ = response_logprobs(logits, state, allowed_ids(rules))
    ref_logits, _ = full_logits(state, learner.reference)
    ref_logprobs, _ = response_logprobs(ref_logits, state, allowed_ids(rules))
    before = np.asarray(state.prompt_length)[:, None] + np.arange(T) - 1
    values = all_values[np.arange(B)[:, None], before]
    for row, steps in enumerate(RESPONSE_LENGTHS):
        rewards = -ppo.kl_coef * (logprobs - ref_logprobs)[row, :steps]
        rewards[-1] += SCORE[row]
        next_value = advantage = 0.0
        for t in reversed(range(steps)):
            delta = rewards[t] + ppo.gamma * next_value - values[row, t]
            advantage = delta + ppo.gamma * ppo.gae_lambda * advantage
            next_value = values[row, t]
            np.testing.assert_allclose(batch.advantages[row, t], advantage, atol=2e-5)
            np.testing.assert_allclose(batch.returns[row, t], advantage + next_value, atol=2e-5)
    np.testing.assert_array_equal(batch.mask, MASK)
    kl = np.where(MASK, logprobs - ref_logprobs, 0).sum(1).mean()
    np.testing.assert_allclose(metrics["objective/kl"], kl, atol=1e-5)
    np.testing.assert_allclose(
        metrics["objective/reward"], SCORE.mean() - ppo.kl_coef * kl, atol=1e-5
    )


def test_a_policy_that_is_its_own_reference_has_no_kl(network, compiled, finished):
    learner = compiled(temperature=0.5, num_microbatches=2)
    start = learner.start
    prepare = learner.compile(learner.learner.prepare)
    prepared, _ = prepare(
        start.params, nnx.state(network.backbone), start.controls, finished, SCORE
    )
    metrics = prepared.metrics
    assert metrics["objective/kl"] == 0
    assert metrics["objective/reward"] == metrics["objective/score"]


def test_what_was_drawn_from_binds_the_policy_and_not_the_reference(
    full_logits, rules, compiled, finished
):
    """The sampling masks of top-k or top-p, tempered; the last state's value bootstraps."""
    learner = compiled(
        temperature=0.7,
        top_k=30,
        length_limit="bootstrap",
        advantage_whitening="none",
        num_minibatches=2,
    )
    state = finished.state
    rng = np.random.default_rng(1)
    sampling_mask = rng.random((B, T, rules.vocab_size)) < 0.05
    sampling_mask &= allowed_ids(rules)
    index = np.minimum(np.asarray(state.prompt_length)[:, None] + np.arange(T), P + T - 1)
    tokens = np.take_along_axis(np.asarray(state.tokens), index, axis=1)
    np.put_along_axis(sampling_mask, tokens[..., None], True, axis=-1)
    batch, _, metrics, distributions, _ = learner.prepare(
        finished._replace(sampling_mask=pack_bits(jnp.asarray(sampling_mask)))
    )
    logits, values = full_logits(state)
    logprobs, log_p = response_logprobs(logits, state, sampling_mask, 0.7)
    ref_logits, _ = full_logits(state, learner.reference)
    ref_logprobs, _ = response_logprobs(ref_logits, state, allowed_ids(rules), 0.7)
    np.testing.assert_allclose(np.asarray(batch.logprobs)[MASK], logprobs[MASK], atol=1e-5)
    kl = np.where(MASK, logprobs - ref_logprobs, 0)
    by_position = distributions["kl_by_position"]
    np.testing.assert_allclose(by_position.numerator, kl.sum(0), atol=1e-5)
    np.testing.assert_array_equal(by_position.denominator, MASK.sum(0))
    np.testing.assert_allclose(metrics["objective/kl"], kl.sum(1).mean(), atol=1e-5)
    entropy = -np.where(sampling_mask, np.exp(log_p) * np.where(sampling_mask, log_p, 0), 0).sum(-1)
    np.testing.assert_allclose(metrics["policy/entropy"], entropy[MASK].mean(), rtol=1e-5)
    whole, _ = response_logprobs(logits, state, allowed_ids(rules), 0.7)
    assert (logprobs - whole)[MASK].min() > 1, "the sampling masks must leave much out"
    # Row 0 was cut off: behind its last token lies the value of the state that it ended in.
    last = RESPONSE_LENGTHS[0] - 1
    behind = values[0, state.length[0] - 1]
    reward = -0.1 * kl[0, last]
    expected = reward + 0.97 * behind - values[0, state.prompt_length[0] + last - 1]
    np.testing.assert_allclose(batch.advantages[0, last], expected, atol=1e-5)
    # Row 3 ended by itself, and is paid its score.
    last = RESPONSE_LENGTHS[3] - 1
    expected = SCORE[3] - 0.1 * kl[3, last] - values[3, state.prompt_length[3] + last - 1]
    np.testing.assert_allclose(batch.advantages[3, last], expected, atol=1e-5)
