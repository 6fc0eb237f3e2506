"""Attention and its gradient against PyTorch's derivative of the formula."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppo_jax.models import attention
from ppo_jax.models.attention import KeyValue, attend


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
def test_gradients_of_attention_are_those_of_its_formula(heads, kv_heads):
    """One query sees no key."""
    batch, queries, keys, size = 2, 9, 11, 8
    rng = np.random.default_rng(0)
    query, cotangent = rng.normal(size=(2, batch, heads, queries, size)).astype(np.float32)
    kept = rng.normal(size=(2, batch, kv_heads, keys, size)).astype(np.float32)
    mask = rng.random((batch, queries, keys)) < 0.5
    mask[:, :, 0] = True
    mask[1, 3] = False
    value, pull_back = jax.vjp(lambda q, kept: attend(q, KeyValue(*kept), mask), query, kept)

    q, k, v = (torch.tensor(x, requires_grad=True) for x in (query, *kept))
    wide = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)]
    logits = q @ wide[0].mT / size**0.5
    logits = logits.masked_fill(~torch.tensor(mask)[:, None], torch.finfo(torch.float32).min)
    expected = logits.softmax(-1) @ wide[1]
    expected.backward(torch.tensor(cotangent))
    np.testing.assert_allclose(value, expected.detach(), rtol=0, atol=1e-5)
    d_query, d_kept = pull_back(cotangent)
    for ours, theirs in zip((d_query, *d_kept), (q, k, v), strict=True):
        assert theirs.grad.abs().max() > 0.5
        np.testing.assert_allclose(ours, theirs.grad, rtol=0, atol=1e-5)
    assert (d_query[1, :, 3] == 0).all()  # nothing that the query says moves a mean


def test_blocks_change_nothing(monkeypatch):
    """Of a row of 23: in blocks of 4, the last one short; some places belong to other sequences."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 4, 23, 8)).astype(np.float32)
    kept = KeyValue(*rng.normal(size=(2, 2, 2, 23, 8)).astype(np.float32))
    mask = np.tril(np.ones((23, 23), bool)) & (rng.random((2, 23, 23)) < 0.7)
    mask |= np.eye(23, dtype=bool)
    cotangent = rng.normal(size=query.shape).astype(np.float32)

    def both():
        value, pull_back = jax.vjp(lambda query, kept: attend(query, kept, mask), query, kept)
        return value, pull_back(cotangent)

    whole = both()
    monkeypatch.setattr(attention, "BLOCK", 4)
    products = str(jax.make_jaxpr(lambda: attend(query, kept, mask))()).count("dot_general")
    assert products == 2 * 6
    chex.assert_trees_all_close(both(), whole, rtol=0, atol=1e-5)


def test_in_bfloat16_every_product_is_of_bfloat16():
    """Forward and backward: of float32 arrays, a GPU computes products half as fast or slower.

    The logits and the gradients of the weights, which subtractions follow, come out in float32. (On
    a CPU their values would not tell: XLA leaves out a rounding that is taken back at once.)
    """
    query = jnp.zeros((1, 4, 3, 8), jnp.bfloat16)
    kept = KeyValue(*jnp.zeros((2, 1, 2, 5, 8), jnp.bfloat16))
    mask = jnp.ones((1, 3, 5), bool)

    def total(query, kept):
        return attend(query, kept, mask).astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(query, kept)
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 6  # two, and two gradients of each
    assert {x.aval.dtype for e in products for x in e.invars} == {jnp.dtype("bfloat16")}
    results = [e.outvars[0].aval for e in products]
    by_keys = [x for x in results if x.shape == (1, 2, 6, 5)]  # [B, K, GQ, S]
    assert [x.dtype for x in by_keys] == [jnp.float32] * 2
    assert all(x.dtype == jnp.bfloat16 for x in results if x.shape != (1, 2, 6, 5))
