"""Gradients that are written out, against PyTorch's and against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ppo_jax.models import DecoderConfig
from ppo_jax.models.decoder import Decoder
from ppo_jax.models.operations import broadcast, embed, swiglu

MANY = (32, 128)  # positions: enough for a sum in bfloat16 to stand still


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_broadcast_vector_has_the_sum_of_all_positions_as_its_gradient(dtype):
    vector = jnp.asarray([0.5, -2.0, 3.0], dtype)
    value, pull_back = jax.vjp(lambda x: broadcast(x, (*MANY, 3), jnp.bfloat16), vector)
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, np.broadcast_to(vector, (*MANY, 3)))
    cotangent = 1 + jnp.asarray(np.random.default_rng(0).normal(size=value.shape), jnp.bfloat16)
    [gradient] = pull_back(cotangent)
    assert gradient.dtype == dtype
    expected = np.asarray(cotangent, np.float64).sum((0, 1))
    np.testing.assert_allclose(np.float64(gradient), expected, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_embedding_that_is_read_often_has_the_sum_of_all_reads_as_its_gradient(dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(5, 3)), dtype)
    ids = rng.choice(4, MANY, p=[0.9, 0.1, 0, 0])
    value, pull_back = jax.vjp(lambda table: embed(table, ids, jnp.bfloat16), table)
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, np.asarray(table.astype(jnp.bfloat16))[ids])
    cotangent = 1 + jnp.asarray(rng.normal(size=value.shape), jnp.bfloat16)
    [gradient] = pull_back(cotangent)
    assert gradient.dtype == dtype
    expected = np.zeros((5, 3))
    np.add.at(expected, ids, np.float64(cotangent))
    np.testing.assert_allclose(np.float64(gradient), expected, rtol=float(jnp.finfo(dtype).eps))


def test_gradients_of_all_parameters_over_many_positions_in_bfloat16():
    """As near to those in float32 as bfloat16 is to a number, give or take a factor of five."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    graphdef, params = nnx.split(Decoder(DecoderConfig(**sizes, **heads), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape), params)
    params = jax.tree.map(lambda x, noise: (x + noise).astype(jnp.bfloat16), params, noise)
    ids, target = rng.integers(0, 50, MANY), rng.normal(0.3, 1, (*MANY, 32))

    def loss(params, dtype):
        network = nnx.merge(graphdef, params)
        network.dtype = jnp.dtype(dtype)
        hidden, _ = network(ids, jnp.ones(MANY, bool))
        return (hidden.astype(jnp.float32) * target).mean()

    # Without LLVM's optimizer, which takes a third of the time.
    options = {"xla_backend_optimization_level": 0}
    gradients = jax.jit(jax.grad(loss), static_argnums=1, compiler_options=options)
    wide = jax.tree.map(jnp.float32, params)
    exact = jax.tree_util.tree_leaves_with_path(gradients(wide, jnp.float32))
    for given in (wide, params):
        ours = jax.tree.leaves(gradients(given, jnp.bfloat16))
        for (path, expected), gradient in zip(exact, ours, strict=True):
            error = np.linalg.norm(np.float64(gradient) - expected) / np.linalg.norm(expected)
            assert error < 5 * 2**-8, jax.tree_util.keystr(path)


def test_gradients_of_swiglu_are_those_of_its_formula():
    """From the tails, where exp(-gate) overflows or vanishes, as from the middle."""
    rng = np.random.default_rng(0)
    gate = np.concatenate([rng.normal(0, 3, 200), [-1e4, -200, -90, -80, 0, 20, 90, 1e4]])
    gate = gate.astype(np.float32)
    up, cotangent = rng.normal(size=(2, gate.size)).astype(np.float32)
    value, pull_back = jax.vjp(swiglu, gate, up)
    theirs = [torch.tensor(x, requires_grad=True) for x in (gate, up)]
    expected = torch.nn.functional.silu(theirs[0]) * theirs[1]
    expected.backward(torch.tensor(cotangent))
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-6, atol=1e-30)
    for ours, tensor in zip(pull_back(cotangent), theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.grad, rtol=2e-5, atol=1e-6)
