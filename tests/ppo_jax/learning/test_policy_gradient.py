"""The learner against exact policy gradients, on tasks so small that every response is listed.

Where all responses of a prompt are in the batch and each one's advantages are multiplied by its
probability, the learner's mean over the batch is an expectation, and its gradient must be that of
the exact objective, which autodiff takes through the probabilities themselves:

    J(θ) = Σ_y π(y) (score(y) - β log(π(y) / π_ref(y))) = E[score] - β KL(π‖π_ref)
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from ppo_jax.generation.rollout import Rollout, rollout
from ppo_jax.learning.batch import make_batch
from ppo_jax.learning.response_outputs import ResponseOutputs
from ppo_jax.sampling import pack_bits
from qwen_env import mdp

EOS, PROMPT = 0, (2, 1)
BETA = 0.3
# Three tokens may be chosen, and the first may not end it: 14 responses of 2 or 3 tokens.
RULES = mdp.Rules(2, 3, 7, (EOS,), forbidden_token_ids=(3, 4, 5, 6), min_new_tokens=1)
TEMPERATURE = 0.8


def all_episodes(rules) -> mdp.State:
    """Every response to the prompt, one a row."""
    rows = []

    def extend(response):
        step = mdp.action_mask(np.asarray(len(response)), rules, np)
        for token in np.flatnonzero(step).tolist():
            longer = (*response, token)
            if token == EOS or len(longer) == rules.max_new_tokens:
                rows.append(longer)
            else:
                extend(longer)

    extend(())
    length = np.array([len(PROMPT) + len(row) for row in rows])
    tokens = np.zeros((len(rows), rules.max_length), np.int32)
    for row, response in enumerate(rows):
        tokens[row, : length[row]] = (*PROMPT, *response)
    terminated = np.array([row[-1] == EOS for row in rows])
    return mdp.State(
        *(jnp.asarray(x, jnp.int32) for x in (tokens, np.full(len(rows), len(PROMPT)), length)),
        jnp.asarray(terminated),
        jnp.asarray(~terminated),
    )


def exact_log_p(network, state, rules, temperature):
    """log π [N, T, V] before each of a row's tokens: from the logits of all positions."""
    mask = jnp.arange(rules.max_length) < state.length[:, None]
    logits = network(state.tokens, mask)[0][:, len(PROMPT) - 1 : -1] / temperature
    allowed = mdp.action_mask(jnp.arange(rules.max_new_tokens), rules, jnp)
    return jax.nn.log_softmax(jnp.where(allowed, logits, -1e9), axis=-1)


def of_tokens(log_p, state):
    """log π(yₜ) of each row's tokens [N, T], 0 behind them."""
    chosen = jnp.take_along_axis(log_p, state.tokens[:, len(PROMPT) :, None], axis=-1)[..., 0]
    return jnp.where(jnp.arange(log_p.shape[1]) < mdp.response_length(state)[:, None], chosen, 0.0)


def most_probable(log_p, top_p):
    """bool [N, T, V]: of each distribution, the fewest ids that reach `top_p`."""
    p = np.exp(np.asarray(log_p, np.float64))
    order = np.argsort(-p, axis=-1)
    ranked = np.take_along_axis(p, order, axis=-1)
    is_kept = np.cumsum(ranked, axis=-1) - ranked < top_p
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, is_kept, axis=-1)
    return kept


class Enumerated:
    """All episodes of a task, and the exact objective of a policy in it.

    With `top_p`, all that the truncated policy may write. Its ids are those of the policy at its
    start, whatever becomes of it, and the reference's are all that the rules allow.
    """

    def __init__(self, network, rules, temperature=1.0, beta=0.0, seed=0, top_p=None):
        self.rules, self.beta = rules, beta
        self.graphdef, self.params = nnx.split(network)
        self.state = all_episodes(rules)
        self.kept = None
        if top_p is not None:
            kept = most_probable(exact_log_p(network, self.state, rules, temperature), top_p)
            is_drawn = np.asarray(of_tokens(jnp.log(kept), self.state)).sum(-1) == 0
            self.state, self.kept = jax.tree.map(lambda x: x[is_drawn], (self.state, kept))
        self.count = len(self.state.length)
        rng = np.random.default_rng(seed)
        self.score = rng.normal(size=self.count).astype(np.float32)
        noise = np.random.default_rng(seed + 1)
        self.reference = jax.tree.map(
            lambda x: x + jnp.asarray(0.1 * noise.normal(size=x.shape), x.dtype),
            self.params["backbone"],
        )

        @functools.partial(jax.jit, static_argnames="truncated")
        def logprobs(params, truncated=True):
            network = nnx.merge(self.graphdef, params)
            log_p = exact_log_p(network, self.state, rules, temperature)
            if truncated and self.kept is not None:
                log_p = jax.nn.log_softmax(jnp.where(self.kept, log_p, -1e9), axis=-1)
            return of_tokens(log_p, self.state)

        self.logprobs = logprobs
        reference = nnx.State({**self.params, "backbone": self.reference})
        self.ref_logprobs = logprobs(reference, truncated=False)
        self.gradient = jax.jit(jax.grad(self.objective))

    def rollout(self):
        """All episodes, as if they had been drawn."""
        kept = None if self.kept is None else pack_bits(jnp.asarray(self.kept))
        return Rollout(self.state, jnp.zeros((self.count, self.rules.max_new_tokens)), kept)

    def objective(self, params):
        log_p, log_ref = self.logprobs(params).sum(-1), self.ref_logprobs.sum(-1)
        return jnp.sum(jnp.exp(log_p) * (self.score - self.beta * (log_p - log_ref)))

    def probabilities(self):
        return np.exp(np.asarray(self.logprobs(self.params), np.float64).sum(-1))

    def as_expected(self, batch):
        """The batch, as if each response were in it in proportion to its probability."""
        weight = jnp.asarray(self.probabilities() * batch.mask.sum(), jnp.float32)
        return batch._replace(advantages=batch.advantages * weight[:, None])


def assert_is_gradient(gradients, expected):
    """The loss falls the way the objective rises; the value head has no part in either."""
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert scale > 0.01
    negative = jax.tree.map(jnp.negative, expected)
    chex.assert_trees_all_close(gradients, negative, rtol=0, atol=1e-5 * scale)


TOP_P = 0.9


@pytest.fixture(scope="module")
def mdp_task(make_tiny_network):
    return Enumerated(make_tiny_network(), RULES, TEMPERATURE, BETA)


@pytest.fixture(scope="module")
def truncated_task(make_tiny_network):
    return Enumerated(make_tiny_network(seed=2), RULES, TEMPERATURE, BETA, top_p=TOP_P)


@pytest.fixture(scope="module")
def make_learner(learner_of):
    def make(task, **changes):
        return learner_of(
            nnx.merge(task.graphdef, task.params),
            task.rules,
            batch_size=task.count,
            kl_coef=task.beta,
            gamma=1.0,
            gae_lambda=1.0,
            advantage_whitening="none",
            value_coef=0.0,
            entropy_coef=0.0,
            **changes,
        )

    return make


@pytest.fixture(scope="module")
def learner(mdp_task, make_learner):
    return make_learner(mdp_task, temperature=TEMPERATURE)


def gradients_of(learner):
    """From a batch to the gradient of the learner's loss at its start."""
    differentiate = learner.compile(lambda *a: learner.learner.gradients(*a)[0])
    return lambda batch: differentiate(learner.start.params, batch)


@pytest.fixture(scope="module")
def gradients(learner):
    return gradients_of(learner)


def batch_of(learner, task):
    """What the learner makes of all episodes of a task."""
    start = learner.start
    prepared, _ = learner.compile(learner.learner.prepare)(
        start.params, task.reference, start.controls, task.rollout(), task.score
    )
    return prepared


def test_the_list_of_responses_is_complete(mdp_task):
    assert mdp_task.count == 2 + 2 * 2 * 3
    assert mdp_task.probabilities().sum() == pytest.approx(1, abs=1e-6)
    assert 0.001 < mdp_task.probabilities().min() < mdp_task.probabilities().max() < 0.6


def test_rewards_penalty_baseline_and_loss_make_the_exact_gradient(mdp_task, learner, gradients):
    """Any baseline does: here the values of a random head."""
    batch = batch_of(learner, mdp_task).batch
    assert jnp.abs(batch.values).max() > 0.3
    expected = mdp_task.gradient(learner.start.params)
    assert_is_gradient(gradients(mdp_task.as_expected(batch)), expected)


def test_so_does_a_penalty_of_the_whole_sequence(mdp_task, make_learner):
    """Each token earns what the others paid as well, which is no part of its gradient's mean."""
    learner = make_learner(mdp_task, temperature=TEMPERATURE, kl_level="sequence")
    batch = batch_of(learner, mdp_task).batch
    expected = mdp_task.gradient(learner.start.params)
    assert_is_gradient(gradients_of(learner)(mdp_task.as_expected(batch)), expected)


def test_of_a_truncated_policy_too(mdp_task, truncated_task, make_learner):
    """Its KL is from the whole reference: of what it never writes, the reference knows better."""
    task, p = truncated_task, truncated_task.probabilities()
    assert 3 < task.count < mdp_task.count
    assert p.sum() == pytest.approx(1, abs=1e-6)
    learner = make_learner(task, temperature=TEMPERATURE, top_p=TOP_P)
    batch, _, metrics, _, _ = batch_of(learner, task)
    logprobs, ref_logprobs = (
        np.asarray(x, np.float64).sum(-1) for x in (task.logprobs(task.params), task.ref_logprobs)
    )
    # With γ = λ = 1, the return of a response's first token is its score less its penalty.
    kl = (task.score - np.asarray(batch.returns)[:, 0]) / BETA
    np.testing.assert_allclose(kl, logprobs - ref_logprobs, atol=1e-5)
    assert metrics["objective/kl"] == pytest.approx(kl.mean(), rel=1e-5)
    # KL(policy‖reference) is at least what the reference gives to all that the policy never writes.
    never_written = 1 - np.exp(ref_logprobs).sum()
    assert never_written > 0.1
    assert p @ kl >= -np.log(1 - never_written) - 1e-6
    assert_is_gradient(
        gradients_of(learner)(task.as_expected(batch)), task.gradient(learner.start.params)
    )


def test_the_rollout_draws_a_truncated_policys_responses(truncated_task, make_learner):
    """Their mean KL, as an iteration reports it, is the exact one up to the noise of the draws."""
    task, draws = truncated_task, 4000
    learner = make_learner(task, temperature=TEMPERATURE, top_p=TOP_P)
    drawn = draw(task, learner, draws)
    counts = np.bincount(places_of(drawn.state, task), minlength=task.count)
    p = task.probabilities()
    assert stats.chisquare(counts, draws * p / p.sum()).pvalue > 1e-3
    start = learner.start
    prepared, _ = learner.compile(learner.learner.prepare)(
        start.params, task.reference, start.controls, drawn, np.zeros(draws, np.float32)
    )
    kl = np.asarray(task.logprobs(task.params) - task.ref_logprobs, np.float64).sum(-1)
    noise = np.sqrt(p @ kl**2 - (p @ kl) ** 2) / np.sqrt(draws)
    assert prepared.metrics["objective/kl"] == pytest.approx(p @ kl, abs=4 * noise)
    assert 4 * noise < 0.2 * (p @ kl)


def exact_values(task):
    """V(s) [N, T] of the states before each token, penalty included: what is still to come."""
    logprobs, ref_logprobs = (
        np.asarray(x, np.float64) for x in (task.logprobs(task.params), task.ref_logprobs)
    )
    rewards = -task.beta * (logprobs - ref_logprobs)
    steps = np.asarray(mdp.response_length(task.state))
    rewards[np.arange(task.count), steps - 1] += task.score
    to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    p, tokens = task.probabilities(), np.asarray(task.state.tokens)
    values = np.zeros_like(rewards)
    for row in range(task.count):
        for t in range(steps[row]):
            before = len(PROMPT) + t
            alike = (tokens[:, :before] == tokens[row, :before]).all(axis=1) & (steps > t)
            values[row, t] = (p * to_come[:, t])[alike].sum() / p[alike].sum()
    return values


@pytest.mark.parametrize(
    ("gae_lambda", "length_limit"), [(0.0, "score"), (0.6, "score"), (0.6, "bootstrap")]
)
def test_with_the_exact_values_every_lambda_makes_it(
    mdp_task, learner, gradients, gae_lambda, length_limit
):
    """Also where, for a response that was cut off, a value of its score stands for the score."""
    config = dataclasses.replace(
        learner.ppo, gae_lambda=gae_lambda, length_limit=length_limit, value_coef=1.0
    )
    shape = (mdp_task.count, 3)
    old = ResponseOutputs(
        mdp_task.logprobs(mdp_task.params),
        jnp.zeros(shape),
        jnp.asarray(exact_values(mdp_task), jnp.float32),
        jnp.asarray(mdp_task.score),
    )
    batch = make_batch(
        Rollout(mdp_task.state, jnp.zeros(shape)),
        jnp.asarray(mdp_task.score),
        old,
        mdp_task.ref_logprobs,
        learner.start.controls,
        config,
    ).batch
    expected = mdp_task.gradient(learner.start.params)
    assert_is_gradient(gradients(mdp_task.as_expected(batch)), expected)


def draw(task, learner, draws):
    """So many responses to the prompt."""
    network = nnx.merge(task.graphdef, task.params)

    @jax.jit
    def sample(key):
        return rollout(
            network,
            jnp.asarray([PROMPT]),
            jnp.asarray([2]),
            key,
            rules=RULES,
            sampling=learner.ppo.sampling,
            completions_per_prompt=draws,
        )

    return sample(jax.random.key(0))


def places_of(state, task):
    """Which of a task's episodes each row is."""
    listed = [tuple(row) for row in np.asarray(task.state.tokens).tolist()]
    return np.array([listed.index(tuple(row)) for row in np.asarray(state.tokens).tolist()])


def test_the_rollout_draws_responses_with_their_probabilities(mdp_task, learner):
    draws = 6000
    drawn = draw(mdp_task, learner, draws)
    places = places_of(drawn.state, mdp_task)
    counts = np.bincount(places, minlength=mdp_task.count)
    p = mdp_task.probabilities()
    assert stats.chisquare(counts, draws * p / p.sum()).pvalue > 1e-3
    np.testing.assert_allclose(
        drawn.logprobs, np.asarray(mdp_task.logprobs(mdp_task.params))[places], atol=1e-5
    )


# One token, two ids: the whole update is gradient ascent that can be written down. Adam with an ε
# above every gradient and no memory is plain gradient descent: with the learning rate ε · η, its
# step is η g / (1 + |g| / ε).
TWO_ARMS = mdp.Rules(2, 1, 7, (EOS,), forbidden_token_ids=(2, 3, 4, 5, 6))
STEPS, RATE, EPSILON = 12, 0.015, 1e5


@pytest.fixture(scope="module")
def bandit(make_tiny_network):
    return Enumerated(make_tiny_network(seed=1), TWO_ARMS)


@pytest.fixture(scope="module")
def bandit_learner(bandit, learner_of):
    return learner_of(
        nnx.merge(bandit.graphdef, bandit.params),
        TWO_ARMS,
        batch_size=2,
        kl_coef=0.0,
        gamma=1.0,
        gae_lambda=1.0,
        advantage_whitening="none",
        value_coef=0.0,
        entropy_coef=0.0,
        num_epochs=STEPS,
        learning_rate=RATE * EPSILON,
        adam_b1=0.0,
        adam_b2=0.0,
        adam_eps=EPSILON,
        weight_decay=0.0,
        max_grad_norm=1e9,
    )


@pytest.fixture(scope="module")
def arms(bandit, bandit_learner):
    """A batch of both arms, their advantages their scores."""
    zeros = jnp.zeros((2, 1))
    return make_batch(
        Rollout(bandit.state, zeros),
        jnp.asarray(bandit.score),
        ResponseOutputs(bandit.logprobs(bandit.params), zeros, zeros, zeros[:, 0]),
        bandit.ref_logprobs,
        bandit_learner.start.controls,
        bandit_learner.ppo,
    ).batch


def test_the_exact_gradient_of_a_bandit_has_its_closed_form(bandit):
    """∇J = p (1 - p) (S₁ - S₀) ∇(z₁ - z₀)."""
    p = bandit.probabilities()

    @jax.jit
    @jax.grad
    def of_difference(params):
        first, second = bandit.logprobs(params)[:, 0]
        return second - first

    factor = p[0] * p[1] * (bandit.score[1] - bandit.score[0])
    expected = jax.tree.map(lambda x: factor * x, of_difference(bandit.params))
    chex.assert_trees_all_close(bandit.gradient(bandit.params), expected, rtol=1e-4, atol=1e-6)


def test_the_update_is_exact_gradient_ascent(bandit, bandit_learner, arms):
    """Off policy from the second step on: as p_old ρ = π, the gradient is exact all the same."""
    state, metrics, _ = bandit_learner.update(bandit.as_expected(arms))
    assert metrics["policy/clip_fraction"] == 0
    params = bandit.params
    for _ in range(STEPS):
        gradient = bandit.gradient(params)
        params = jax.tree.map(lambda x, g: x + RATE * g, params, gradient)
    moves = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, bandit.params)
    distance = max(jax.tree.leaves(moves))
    assert distance > 0.01
    chex.assert_trees_all_close(state.params, params, rtol=0, atol=1e-3 * distance)
    assert bandit.objective(state.params) > bandit.objective(bandit.params) + 1e-3


def test_the_clip_ends_it(bandit, bandit_learner, arms):
    """With large advantages, both ratios soon leave the range, and then nothing moves any more."""
    better = int(np.argmax(bandit.score))
    sign = jnp.where(jnp.arange(2) == better, 1.0, -1.0)
    strong = arms._replace(advantages=60 * sign[:, None])
    state, metrics, _ = bandit_learner.update(strong)
    ratio = np.exp(bandit.logprobs(state.params) - arms.logprobs)[:, 0]
    assert ratio[better] > 1.2 and ratio[1 - better] < 0.8
    assert 0 < metrics["policy/clip_fraction"] < 1
    again, metrics, _ = bandit_learner.update(strong, state=state)
    assert metrics["policy/clip_fraction"] == 1
    chex.assert_trees_all_equal(again.params, state.params)
