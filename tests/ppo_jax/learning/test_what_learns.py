"""Critic warm-up, frozen parts and a moving reference: what moves in an iteration, and how far."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

WARMUP = 2
# One learner with all of them, for the sake of the time it takes to compile.
SETTINGS = {
    "critic_warmup_iterations": WARMUP,
    "freeze_embeddings": True,
    "num_frozen_layers": 1,
    "weight_decay": 0.1,
    "ref_ema_decay": 0.75,
    "critic": "separate",
    "num_epochs": 1,
}


@pytest.fixture(scope="module")
def states(compiled, batch):
    """At the start, and after each of four iterations on one batch."""
    learner = compiled(**SETTINGS)
    states = [learner.start]
    for _ in range(4):
        states.append(learner.update(batch, state=states[-1])[0])
    return states


def by_name(params):
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(params)
    }


def test_during_the_critics_warm_up_it_alone_learns(states):
    start, end = by_name(states[0].params), by_name(states[WARMUP].params)
    for name, before in start.items():
        if name.startswith("backbone."):
            np.testing.assert_array_equal(end[name], before, err_msg=name)
        else:
            assert name.startswith(("critic.", "value_head."))
            assert np.abs(end[name] - before).max() > 1e-3, name
    assert states[WARMUP].opt_state.count == WARMUP


def test_the_policys_first_step_is_a_proper_first_step_of_adam(compiled, states):
    """m̂ / (√v̂ + ε) of one gradient g is g / (|g| + ε): no older step is counted for bias."""
    before, after = states[WARMUP], states[WARMUP + 1]
    optimizer = compiled(**SETTINGS).optimizer
    assert after.opt_state.count == 1
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    start, end = by_name(before.params), by_name(after.params)
    moments = by_name(after.opt_state.mu), by_name(after.opt_state.nu)
    largest = 0.0
    for name in start:
        gradient = moments[0][name] / (1 - optimizer.adam_b1)
        np.testing.assert_allclose(
            moments[1][name], (1 - optimizer.adam_b2) * gradient**2, rtol=1e-4, atol=1e-12
        )
        step = gradient / (np.abs(gradient) + optimizer.adam_eps)
        if not ("norm" in name or "bias" in name):
            step = step + decay * start[name]
        if name == "backbone.embed_tokens":
            step = 0 * step
        elif name.startswith("backbone.layers."):
            step[0] = 0
        np.testing.assert_allclose(end[name] - start[name], -rate * step, rtol=1e-3, atol=3e-7)
        largest = max(largest, np.abs(end[name] - start[name]).max())
    assert largest > 0.9 * rate
    assert states[WARMUP + 2].opt_state.count == 2  # and it begins only once


def test_steps_get_shorter_from_iteration_to_iteration(compiled, batch):
    """Adam's first step is as long as the rate, so here it always takes its first."""
    learner = compiled(schedule="linear", weight_decay=0.0, num_epochs=1)
    state = learner.start
    for rate in (1e-3, 0.9e-3):  # there are ten iterations
        before = state._replace(opt_state=learner.start.opt_state)
        state, metrics, _ = learner.update(batch, state=before)
        assert metrics["policy/learning_rate"] == pytest.approx(rate)
        steps = jax.tree.map(lambda new, old: jnp.abs(new - old), state.params, before.params)
        longest = max(float(x.max()) for x in jax.tree.leaves(steps))
        assert longest == pytest.approx(rate, rel=0.01)


def test_frozen_parts_never_move_and_the_others_do(states):
    """Nor does weight decay move them."""
    start, end = by_name(states[0].params), by_name(states[-1].params)
    for name, before in start.items():
        moved = end[name] != before
        if name == "backbone.embed_tokens":
            assert not moved.any()
        elif name.startswith("backbone.layers."):
            assert not moved[0].any(), name
            assert moved[1].any(), name
        else:
            assert moved.any(), name
    assert (end["critic.embed_tokens"] != start["critic.embed_tokens"]).any()


def test_frozen_parts_have_no_part_in_the_gradient_norm(compiled, batch, states):
    """Or the clip of what learns would depend on what does not."""
    learner = compiled(**SETTINGS)
    _, metrics, _ = learner.update(batch, state=states[WARMUP])
    moments = by_name(learner.update(batch, state=states[WARMUP])[0].opt_state.mu)
    clipped = np.sqrt(sum(np.square(x / 0.1, dtype=np.float64).sum() for x in moments.values()))
    expected = min(float(metrics["policy/grad_norm"]), learner.optimizer.max_grad_norm)
    assert clipped == pytest.approx(expected, rel=1e-4)
    assert not moments["backbone.embed_tokens"].any()
    assert not moments["backbone.layers.mlp.up_proj.weight"][0].any()


def test_the_reference_is_an_exponential_mean_of_the_policies(states):
    chex.assert_trees_all_equal(states[0].reference, states[0].params["backbone"])
    for before, after in itertools.pairwise(states):
        expected = jax.tree.map(
            lambda old, new: 0.75 * np.float64(old) + 0.25 * np.float64(new),
            before.reference,
            after.params["backbone"],
        )
        chex.assert_trees_all_close(after.reference, expected, rtol=1e-6, atol=1e-9)
    start, end = (by_name(s.params["backbone"])["norm.weight"] for s in (states[0], states[-1]))
    moved = by_name(states[-1].reference)["norm.weight"]
    assert (np.abs(moved - start) < np.abs(end - start)).all()
    assert np.abs(moved - start).max() > 1e-4
