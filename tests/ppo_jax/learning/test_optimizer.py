"""AdamW against PyTorch's, the learning rate's schedule, and which parameters learn."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from ppo_jax.config import OptimizerConfig
from ppo_jax.learning.optimizer import (
    Learns,
    adamw,
    global_norm,
    learning_rate_schedule,
    mean_step,
)
from ppo_jax.models import with_separate_critic

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", weight_decay=0.1, max_grad_norm=0.5
)


@pytest.fixture(scope="module")
def params(make_network):
    return nnx.state(make_network())


def stepped(
    config, params, state, gradients, *, norm=1.0, learning_rate=None, applied=True, critic=True
):
    """(parameters, state) after a step of all parameters, or of all but the critic's."""
    updates, state = adamw(config).update(
        gradients,
        state,
        params,
        norm=jnp.float32(norm),
        learning_rate=jnp.float32(learning_rate or config.learning_rate),
        learns=Learns(jnp.asarray(applied), jnp.asarray(applied and critic)),
    )
    return optax.apply_updates(params, updates), state


def by_name(params):
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(params)
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"adam_b1": 0.8, "adam_b2": 0.95, "adam_eps": 1e-8, "max_grad_norm": 2.0}],
    ids=["defaults", "others"],
)
def test_twenty_steps_equal_those_of_pytorch(changes):
    """Gradients of very different sizes, so that the clip acts on some steps and not on others."""
    config = dataclasses.replace(OPTIMIZER, **changes)
    rng = np.random.default_rng(0)
    shapes = {"weight": (4, 3), "bias": (4,), "norm": (3,)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    adam = torch.optim.AdamW(
        [
            {"params": [theirs["weight"]], "weight_decay": config.weight_decay},
            {"params": [theirs["bias"], theirs["norm"]], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_b1, config.adam_b2),
        eps=config.adam_eps,
    )

    @jax.jit
    def step(params, state, gradients):
        return stepped(config, params, state, gradients, norm=global_norm(gradients))

    ours, state = start, adamw(config).init(start)
    norms = []
    for _ in range(20):
        scale = 10.0 ** rng.uniform(-3, 1)
        gradients = {
            name: scale * rng.normal(size=s).astype(np.float32) for name, s in shapes.items()
        }
        ours, state = step(ours, state, gradients)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.values(), config.max_grad_norm).item())
        adam.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(
                ours[name], parameter.detach(), rtol=2e-6, atol=2e-7, err_msg=name
            )
    assert min(norms) < config.max_grad_norm < max(norms)
    assert np.abs(ours["weight"] - start["weight"]).max() > 0.05


@pytest.mark.parametrize("shape", [(), (3,), (16,), (5, 7), (3, 16, 4)])
def test_the_norm_is_that_of_all_numbers_together(shape):
    """Whether or not an array divides into sixteenths."""
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=shape), "b": {"c": rng.normal(size=(40, 9))}}
    expected = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(tree)))
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    np.testing.assert_allclose(global_norm(tree), expected, rtol=1e-6)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    assert global_norm(halves).dtype == jnp.float32
    np.testing.assert_allclose(global_norm(halves), expected, rtol=1e-2)


def test_a_step_keeps_the_types_it_finds():
    params = {"weight": jnp.ones((4, 3), jnp.bfloat16), "norm": jnp.ones(3, jnp.float32)}
    state = adamw(OPTIMIZER).init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    after, state_after = stepped(OPTIMIZER, params, state, gradients, learning_rate=0.1)
    chex.assert_trees_all_equal_dtypes((after, state_after), (params, state))
    assert after["weight"][0, 0] < 1


def test_the_second_moment_of_bfloat16_parameters_decays():
    """By a thousandth a step, less than half of what bfloat16 can tell."""
    params = {"weight": jnp.ones((4, 3), jnp.bfloat16)}
    state = adamw(OPTIMIZER).init(params)
    state = state._replace(nu=jax.tree.map(jnp.ones_like, state.nu))
    nothing = jax.tree.map(jnp.zeros_like, params)
    step = jax.jit(lambda state: stepped(OPTIMIZER, params, state, nothing, norm=0.0)[1])
    for _ in range(20):
        state = step(state)
    np.testing.assert_allclose(state.nu["weight"], OPTIMIZER.adam_b2**20, rtol=1e-6)


def test_a_step_that_is_not_applied_changes_nothing(params):
    config = dataclasses.replace(OPTIMIZER, weight_decay=1.0)
    noise = jax.tree.map(jnp.cos, params)
    _, state = stepped(config, params, adamw(config).init(params), noise)
    gradients = jax.tree.map(lambda x: jnp.nan * x, params)
    same = stepped(config, params, state, gradients, norm=np.nan, applied=False)
    chex.assert_trees_all_equal(same, (params, state))


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1.0])
def test_the_mean_step_is_that_of_what_learns(eps):
    """Adam's first step is |g| / (|g| + ε) learning rates long."""
    config = dataclasses.replace(OPTIMIZER, adam_eps=eps, max_grad_norm=1e9)
    rng = np.random.default_rng(0)
    shapes = {"layers": (2, 48, 5), "norm": (33,)}
    gradient = {k: 1e-5 * rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    params = {"backbone": jax.tree.map(jnp.ones_like, gradient), "value_head": jnp.ones(3)}
    initial = adamw(config).init(params)
    gradients = {"backbone": gradient, "value_head": 1e3 * jnp.ones(3)}
    _, state = stepped(config, params, initial, gradients, norm=1.0)
    rows = gradient["layers"].reshape(-1, 5)[::16]  # one in sixteen, of a vector's one row all
    learns = np.concatenate([rows.ravel(), gradient["norm"]]).astype(np.float64)
    expected = np.mean(np.abs(learns) / (np.abs(learns) + eps))
    assert mean_step(state, config) == pytest.approx(expected, rel=1e-5)
    assert mean_step(initial, config) == 0


def test_norms_and_biases_do_not_decay(params):
    config = dataclasses.replace(OPTIMIZER, weight_decay=1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved, _ = jax.jit(
        lambda params: stepped(
            config, params, adamw(config).init(params), zeros, norm=0.0, learning_rate=1.0
        )
    )(params)
    updates = jax.tree.map(lambda new, old: new - old, moved, params)
    for (path, update), (_, param) in zip(
        nnx.to_flat_state(updates), nnx.to_flat_state(params), strict=True
    ):
        decays = "bias" not in path and not any("norm" in str(part) for part in path)
        expected = -param.get_value() if decays else jnp.zeros_like(param.get_value())
        np.testing.assert_allclose(update.get_value(), expected, err_msg=str(path))


@pytest.mark.parametrize(
    ("schedule", "held", "warmup", "expected"),
    [
        ("constant", 0, 0, {0: 1.0, 9: 1.0}),
        ("linear", 0, 0, {0: 1.0, 5: 0.5, 9: 0.1}),
        ("cosine", 0, 0, {0: 1.0, 5: 0.5, 9: (1 + np.cos(0.9 * np.pi)) / 2}),
        ("linear", 0, 2, {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 9: 0.125}),
        ("constant", 0, 1, {0: 1.0, 1: 1.0}),
        ("linear", 2, 0, {0: 1.0, 1: 1.0, 2: 1.0, 6: 0.5, 9: 0.125}),
        ("cosine", 2, 0, {0: 1.0, 2: 1.0, 6: 0.5, 9: (1 + np.cos(7 / 8 * np.pi)) / 2}),
        ("linear", 3, 2, {0: 1.0, 2: 1.0, 3: 0.5, 4: 1.0, 5: 1.0, 7: 0.6, 9: 0.2}),
        ("constant", 2, 4, {0: 1.0, 1: 1.0, 2: 0.25, 5: 1.0, 9: 1.0}),
    ],
)
def test_learning_rate_by_iteration(schedule, held, warmup, expected):
    config = OptimizerConfig(
        learning_rate=1.0,
        schedule=schedule,
        critic_warmup_iterations=held,
        warmup_iterations=warmup,
    )
    rate = learning_rate_schedule(config, num_iterations=10)
    for iteration, value in expected.items():
        np.testing.assert_allclose(rate(iteration), value, atol=1e-6)


def test_a_schedule_begins_whenever_the_policy_does():
    """Where the critic's warm-up ended earlier than it might have."""
    config = OptimizerConfig(
        learning_rate=1.0, schedule="linear", critic_warmup_iterations=6, warmup_iterations=2
    )
    rate = jax.jit(lambda i, held: learning_rate_schedule(config, 10, held)(i))
    for iteration, value in {0: 1.0, 2: 0.5, 3: 1.0, 4: 1.0, 7: 0.5, 9: 1 / 6}.items():
        np.testing.assert_allclose(rate(iteration, 2), value, atol=1e-6)


@pytest.mark.parametrize("separate", [False, True])
def test_a_policy_and_its_critic_are_counted_apart(make_network, separate):
    """Three steps of both after one of the policy alone: those of two Adams."""
    network = make_network()
    params = nnx.state(with_separate_critic(network) if separate else network)
    config = dataclasses.replace(OPTIMIZER, max_grad_norm=1e9)
    gradients = jax.tree.map(jnp.cos, params)
    step = jax.jit(
        lambda x, state, critic: stepped(config, x, state, gradients, critic=critic),
        static_argnums=2,
    )

    def after(*critics):
        x, state = params, adamw(config).init(params)
        for critic in critics:
            x, state = step(x, state, critic)
        return by_name(x), by_name(state.mu), state

    four, three, held = after(*[True] * 4), after(*[True] * 3), after(False, True, True, True)
    assert (held[2].count, held[2].critic_count) == (4, 3)
    for part in range(2):
        for name, x in held[part].items():
            is_critic = name.startswith(("critic.", "value_head."))
            expected = (three if is_critic else four)[part][name]
            np.testing.assert_array_equal(x, expected, err_msg=name)


def test_a_gradient_is_masked_where_nothing_learns_from_it(make_network):
    params = nnx.state(with_separate_critic(make_network()))
    ones = jax.tree.map(jnp.ones_like, params)
    for name, x in by_name(Learns(jnp.asarray(False), True).masked(ones)).items():
        assert (x == name.startswith(("critic.", "value_head."))).all(), name
    assert Learns(True, True).masked(ones) is ones


@pytest.mark.parametrize("separate", [False, True])
def test_the_critic_has_a_learning_rate_of_its_own(make_network, separate):
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    network = make_network()
    params = nnx.state(with_separate_critic(network) if separate else network)
    config = OptimizerConfig(learning_rate=1e-3, critic_learning_rate=3e-3, max_grad_norm=1e9)
    ones = jax.tree.map(jnp.ones_like, params)
    moved, _ = stepped(  # half way down the schedule
        config, params, adamw(config).init(params), ones, learning_rate=0.5e-3
    )
    before, after = by_name(params), by_name(moved)
    assert any(name.startswith("critic.") for name in before) == separate
    for name, x in before.items():
        rate = 1.5e-3 if name.startswith(("critic.", "value_head.")) else 0.5e-3
        np.testing.assert_allclose(x - after[name], rate, rtol=1e-2, err_msg=name)
