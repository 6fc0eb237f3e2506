"""Whose gradients reach what: a shared, a stopped and a separate critic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def gradients(compiled):
    """From a kind of critic and a batch to the gradient of the total loss, by part."""

    @functools.cache
    def differentiate(critic):
        learner = compiled(critic=critic)
        function = learner.compile(lambda *a: learner.learner.gradients(*a)[0])
        return functools.partial(function, learner.start.params)

    def of(critic, *batches):
        return [dict(differentiate(critic)(batch).items()) for batch in batches]

    return of


def is_same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bool((a == b).all()) for a, b in pairs)


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("critic", ["shared", "stopped", "separate"])
def test_what_returns_and_advantages_reach(gradients, batch, critic):
    plain, other_returns, other_advantages = gradients(
        critic,
        batch,
        batch._replace(returns=batch.returns + batch.mask),
        batch._replace(advantages=2 * batch.advantages),
    )
    # Returns move the head, whoever's hidden states it reads; and the backbone it may reach.
    assert largest(plain["value_head"]) > 0
    assert not is_same(plain["value_head"], other_returns["value_head"])
    assert is_same(plain["backbone"], other_returns["backbone"]) == (critic != "shared")
    # Advantages move the policy, and never the value function.
    assert not is_same(plain["backbone"], other_advantages["backbone"])
    assert is_same(plain["value_head"], other_advantages["value_head"])
    assert ("critic" in plain) == (critic == "separate")
    if critic == "separate":
        assert largest(plain["critic"]) > 0
        assert not is_same(plain["critic"], other_returns["critic"])
        assert is_same(plain["critic"], other_advantages["critic"])


def test_whatever_the_critic_the_policys_gradient_is_the_same(gradients, batch):
    """Of a critic that starts as a copy, the values are those of the shared backbone."""
    (stopped,), (separate,), (shared,) = (
        gradients(critic, batch) for critic in ("stopped", "separate", "shared")
    )
    scale = largest(stopped["backbone"])
    for a, b in zip(*(jax.tree.leaves(x["backbone"]) for x in (stopped, separate)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)
    for a, b in zip(*(jax.tree.leaves(x["value_head"]) for x in (shared, separate)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    # The shared backbone has the gradient of the policy and, on top, that of the critic.
    for name in ("embed_tokens", "layers", "norm"):
        parts = [x[name] for x in (stopped["backbone"], separate["critic"], shared["backbone"])]
        for policy, critic, both in zip(*map(jax.tree.leaves, parts), strict=True):
            np.testing.assert_allclose(policy + critic, both, rtol=0, atol=1e-6 * scale)
