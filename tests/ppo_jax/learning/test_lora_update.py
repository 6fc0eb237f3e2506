"""Adapters in an update: what moves, that it moves as the merged weights say, on any devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.learning.frozen import join
from ppo_jax.models.lora import merged

LORA = {"lora_rank": 3, "lora_alpha": 12.0, "num_epochs": 2}
TOGETHER = {"critic": "separate", "num_frozen_layers": 1, "ref_ema_decay": 0.9, "weight_decay": 0.1}


def names(params):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}


@pytest.fixture(scope="module")
def learners(network, rules, learner_of):
    return functools.cache(functools.partial(learner_of, network, rules))


def test_only_adapters_and_heads_learn(learners, batch):
    """They have the gradients, the moments, the moving reference, and the checkpoint's places."""
    learner = learners(**LORA, **TOGETHER)
    state, metrics, _ = learner.update(batch)
    for tree in (state.params, state.opt_state.mu, state.opt_state.nu):
        heads = {name for name in names(tree) if ".adapter.lora_" not in name}
        assert heads == {"value_head.weight", "value_head.bias"}
    assert all(".adapter.lora_" in f".{name}" for name in names(state.reference))
    assert {name.split(".")[1] for name in names(state.params)} == {"layers", "weight", "bias"}
    start = dict(nnx.to_flat_state(learner.start.params))
    for path, variable in nnx.to_flat_state(state.params):
        assert (variable.get_value() != start[path].get_value()).any(), path
    assert metrics["update/nonfinite"] == 0
    assert metrics["policy/first_ratio_max_error"] < 1e-5


def test_the_first_gradient_is_that_of_the_weights(learners, compiled, batch):
    """With B = 0: of W, projected on A; none for A. The gradients of W are full training's."""
    step = {"num_epochs": 1, "max_grad_norm": 1e9, "weight_decay": 0.0}
    lora = learners(**LORA | step)
    of_adapters = lora.update(batch)[0].opt_state.mu
    of_weights = compiled(**step).update(batch)[0].opt_state.mu
    chex.assert_trees_all_close(of_adapters["value_head"], of_weights["value_head"], rtol=1e-5)
    layers = dict(nnx.to_flat_state(of_weights["backbone"]["layers"]))
    a_of = dict(nnx.to_flat_state(lora.start.params["backbone"]["layers"]))
    for path, variable in nnx.to_flat_state(of_adapters["backbone"]["layers"]):
        *place, _, part = path
        gradient = np.asarray(variable.get_value())
        if part == "lora_A":
            assert not gradient.any()
            continue
        a = np.asarray(a_of[(*place, "adapter", "lora_A")].get_value())
        of_weight = np.asarray(layers[(*place, "weight")].get_value())
        expected = 4 * np.einsum("loi,lri->lor", of_weight, a)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5 * scale, err_msg=path)


def test_after_updates_the_merged_weights_say_the_same(learners, batch):
    learner = learners(**LORA, **TOGETHER)
    state, *_ = learner.update(batch)
    params = join(state.params, learner.frozen)
    network = nnx.merge(learner.learner.graphdef, params)
    tokens, mask = (
        np.asarray(batch.tokens),
        np.arange(batch.tokens.shape[1]) < batch.length[:, None],
    )
    with_adapters, plain = (jax.jit(n.__call__)(tokens, mask) for n in (network, merged(network)))
    before = learner.network(tokens, mask)
    for ours, expected, other in zip(plain, with_adapters, before, strict=True):
        np.testing.assert_allclose(ours[mask], expected[mask], rtol=0, atol=2e-5)
        assert np.abs(ours[mask] - other[mask]).max() > 1e-2


@pytest.mark.slow
def test_shards(learner_of, make_network, rules, finished):
    """Two copies of two shards, with a separate critic, a moving reference, frozen layers, remat
    and packed rows; computed in bfloat16, no further apart than that type is from float32."""
    cuts = {"num_devices": 4, "num_shards": 2, "num_packed_sizes": 2, "remat": True}

    def learners(dtype):
        network = make_network()
        network.backbone.dtype = jnp.dtype(dtype)
        return [learner_of(network, rules, **LORA, **TOGETHER, **cut) for cut in ({}, cuts)]

    one, four = learners("float32")
    prepared = one.prepare(finished).batch
    chex.assert_trees_all_close(four.prepare(finished).batch, prepared, rtol=0, atol=2e-6)
    exact, result = one.update(prepared)[0], four.update(prepared)[0]
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(exact.opt_state.mu))
    moments = jax.device_get((result.opt_state.mu, exact.opt_state.mu))
    chex.assert_trees_all_close(*moments, rtol=0, atol=1e-6 * scale)
    chex.assert_trees_all_close(*jax.device_get((result.params, exact.params)), atol=2e-6)
    halved = [learner.update(prepared)[0] for learner in learners("bfloat16")]
    exact, *halved = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(state.params))])
        for state in (exact, *halved)
    )
    rounding = np.linalg.norm(halved[0] - exact)
    assert 0 < np.linalg.norm(halved[1] - halved[0]) < rounding
