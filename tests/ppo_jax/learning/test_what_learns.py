"""Critic warm-up, frozen parts and a moving reference: what moves in an iteration, and how far."""

import functools
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
    assert (states[WARMUP].opt_state.count, states[WARMUP].opt_state.critic_count) == (0, WARMUP)


def test_the_policys_first_step_is_a_proper_first_step_of_adam(compiled, states):
    """m̂ / (√v̂ + ε) of one gradient g is g / (|g| + ε): no older step is counted for bias.

    The critic's moments go on.
    """
    before, after = states[WARMUP], states[WARMUP + 1]
    optimizer = compiled(**SETTINGS).optimizer
    assert (after.opt_state.count, after.opt_state.critic_count) == (1, WARMUP + 1)
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    start, end = by_name(before.params), by_name(after.params)
    moments = by_name(after.opt_state.mu), by_name(after.opt_state.nu)
    largest = 0.0
    for name in start:
        if not name.startswith("backbone."):
            assert (moments[0][name] != 0.1 * by_name(before.opt_state.mu)[name]).any()
            continue
        gradient = moments[0][name] / (1 - optimizer.adam_b1)
        np.testing.assert_allclose(
            moments[1][name], (1 - optimizer.adam_b2) * gradient**2, rtol=1e-4, atol=1e-12
        )
        step = gradient / (np.abs(gradient) + optimizer.adam_eps)
        if not ("norm" in name or "bias" in name):
            step = step + decay * start[name]
        np.testing.assert_allclose(end[name] - start[name], -rate * step, rtol=1e-3, atol=3e-7)
        largest = max(largest, np.abs(end[name] - start[name]).max())
    assert largest > 0.9 * rate
    assert states[WARMUP + 2].opt_state.count == 2


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


def test_all_that_is_not_frozen_moves(states):
    start, end = by_name(states[0].params), by_name(states[-1].params)
    assert "critic.embed_tokens" in start and "backbone.embed_tokens" not in start
    for name, before in start.items():
        assert (end[name] != before).any(), name


@pytest.fixture(scope="module")
def deep(make_network, rules, learner_of):
    """Of four layers: XLA makes another program of a loop over one."""
    network = make_network(num_hidden_layers=4)
    return functools.cache(functools.partial(learner_of, network, rules))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_frozen_layers": 2},
        {"num_frozen_layers": 2, "freeze_embeddings": True, "num_microbatches": 2},
        {"num_frozen_layers": 4, "freeze_embeddings": True, "critic": "separate"},
    ],
    ids=str,
)
def test_what_learns_moves_as_if_nothing_were_frozen(deep, batch, changes):
    """By a step that is not clipped, to the last bit. Of what is frozen there are no moments."""
    step = {"num_epochs": 1, "max_grad_norm": 1e9}
    frozen = deep(**step, **changes)
    others = {k: v for k, v in changes.items() if k in ("num_microbatches", "critic")}
    end, metrics, _ = frozen.update(batch)
    expected, other_metrics, _ = deep(**step, **others).update(batch)
    count = changes["num_frozen_layers"]
    is_whole = frozen.network.config.num_hidden_layers == count
    for part in ("params", "mu", "nu"):
        parts = [
            by_name(s.params if part == "params" else getattr(s.opt_state, part))
            for s in (end, expected)
        ]
        for name, value in parts[0].items():
            whole = parts[1].pop(name)
            at = slice(count, None) if name.startswith("backbone.layers.") else ...
            np.testing.assert_array_equal(value, whole[at], err_msg=f"{part} {name}")
        left = {name.split(".")[1] for name in parts[1]}
        embeddings = {"embed_tokens"} if "freeze_embeddings" in changes else set()
        assert left == embeddings | ({"layers"} if is_whole else set())
    assert metrics["policy/loss"] == other_metrics["policy/loss"]
    assert metrics["policy/grad_norm"] < other_metrics["policy/grad_norm"]


def test_frozen_parts_have_no_part_in_the_gradient_norm(compiled, batch, states):
    """Or the clip of what learns would depend on what does not."""
    learner = compiled(**SETTINGS)
    end, metrics, _ = learner.update(batch, state=states[WARMUP])
    old = by_name(states[WARMUP].opt_state.mu)
    steps = {name: mu - 0.9 * old[name] for name, mu in by_name(end.opt_state.mu).items()}
    clipped = np.sqrt(sum(np.square(x / 0.1, dtype=np.float64).sum() for x in steps.values()))
    expected = min(float(metrics["policy/grad_norm"]), learner.optimizer.max_grad_norm)
    assert clipped == pytest.approx(expected, rel=1e-4)


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
