"""Parameters that are kept in bfloat16: what adds up over many steps or parts is not."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.algorithm import token_weights
from ppo_jax.learning.loss import ppo_loss
from ppo_jax.mesh import ROWS

DECAY = 0.99


@pytest.fixture(scope="module")
def halved(network):
    graphdef, params = nnx.split(network)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["backbone"])
    return nnx.merge(graphdef, nnx.State({**params, "backbone": halves}))


@pytest.fixture(scope="module")
def learner(learner_of, halved, rules):
    return learner_of(halved, rules, num_microbatches=4, num_epochs=1, ref_ema_decay=DECAY)


def test_the_types_of_the_state_stay(learner, batch):
    """Or the next iteration would be compiled anew, and no buffer taken over."""
    start = learner.start
    state, metrics, _ = learner.update(batch, state=start)
    assert metrics["update/epochs"] == 1
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, start)
    for tree, dtype in (
        (state.params, jnp.bfloat16),
        (state.opt_state.mu, jnp.bfloat16),
        (state.opt_state.nu, jnp.float32),
    ):
        assert {x.dtype for x in jax.tree.leaves(tree["backbone"])} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state.reference)} == {jnp.dtype(jnp.float32)}


def test_gradients_of_micro_batches_are_added_up_in_float32(
    learner, learner_of, halved, rules, batch
):
    start = learner.start.params
    whole = learner_of(halved, rules)
    weights = token_weights(batch.mask)

    @learner.compile
    def alone(batch, weights):
        """One row's part of the gradient."""

        def loss(params):
            written = batch.tokens, batch.prompt_length, batch.length
            return ppo_loss(
                whole.learner.response_outputs(params, *written), batch, weights, whole.ppo
            )[0]

        return jax.grad(loss)(start)

    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, weights)) for i in range(4)]
    parts = [jax.tree.leaves(alone(*row)["backbone"]) for row in rows]
    gradients, *_ = learner.compile(learner.learner.gradients)(start, batch)
    at_once, *_ = learner.compile(whole.learner.gradients)(start, batch)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(at_once))
    chex.assert_trees_all_close(
        gradients, jax.tree.map(jnp.float32, at_once), rtol=0, atol=2**-8 * largest
    )
    equal = []
    for ours, *terms in zip(jax.tree.leaves(gradients["backbone"]), *parts, strict=True):
        assert {x.dtype for x in terms} == {jnp.dtype(jnp.bfloat16)}
        expected = sum(np.asarray(x, np.float32) for x in terms)
        equal.append(np.isclose(ours, expected, rtol=1e-5, atol=1e-9).reshape(-1))
    # Where two programs round a part to another neighbour, they are apart.
    assert np.concatenate(equal).mean() > 0.95


def test_a_slow_reference_reaches_a_policy_that_stands_still(learner, batch):
    """Each step is a hundredth of a distance that bfloat16 can just tell."""
    start = learner.start
    reference = jax.tree.map(lambda x: 1.01 * x, start.reference)
    state = start._replace(reference=reference)
    nothing_finite = batch._replace(advantages=jnp.nan * batch.advantages)
    for _ in range(3):
        state, metrics, _ = learner.update(nothing_finite, state=state)
        assert metrics["update/nonfinite"] == 1
    expected = jax.tree.map(
        lambda old, now: now + DECAY**3 * (np.float64(old) - np.float64(now)),
        reference,
        start.params["backbone"],
    )
    chex.assert_trees_all_close(state.reference, expected, rtol=1e-6, atol=1e-9)


def test_gradients_of_devices_are_added_up_in_float32(learner_of, halved, rules, batch):
    learner = learner_of(halved, rules)
    on_a_mesh = dataclasses.replace(
        learner.learner, mesh=jax.make_mesh((1, 1), ROWS, (jax.sharding.AxisType.Auto,) * 2)
    )
    program = str(jax.make_jaxpr(on_a_mesh.gradients)(learner.start.params, batch))
    [summed] = re.findall(r"([^\n]*) = psum\w*\[[^]]*\]", program, re.DOTALL)[:1]
    assert "bf16" not in summed
    assert "f32" in summed
