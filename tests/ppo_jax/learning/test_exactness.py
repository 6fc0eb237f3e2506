"""What an update must not depend on: how a minibatch is cut, on how many devices, what pads it,
how its rows lie.

The plain update is compiled as training does. Where parameters are compared,
Adam has divided each gradient by its own size, so that the rounding of a gradient that all but
vanishes becomes a visible step: what is compared closely is the first moment, a running mean of
the gradients themselves.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.generation.rollout import Rollout, rollout
from ppo_jax.learning.packing import first_fit
from ppo_jax.learning.response_outputs import response_outputs
from ppo_jax.sampling import Sampling
from qwen_env import mdp

P, T = 5, 6


def assert_same_update(one, other):
    state, metrics, _ = one
    other_state, other_metrics, _ = other
    mu, other_mu = state.opt_state.mu, other_state.opt_state.mu
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(mu))
    chex.assert_trees_all_close(mu, other_mu, rtol=0, atol=1e-6 * scale)
    chex.assert_trees_all_close(state.params, other_state.params, rtol=1e-6, atol=2e-6)
    assert metrics.keys() == other_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(
            metrics[name], other_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


def widened(finished: Rollout, more_prompt: int, more_response: int) -> Rollout:
    """The same episodes under larger limits, with ids that mean nothing behind them."""
    state, width = finished.state, P + T + more_prompt + more_response
    padding = np.random.default_rng(3).integers(0, 600, (len(state.length), width))
    tokens = padding.copy()
    tokens[:, : P + T] = state.tokens
    tokens = np.where(np.arange(width) < np.asarray(state.length)[:, None], tokens, padding)
    logprobs = jnp.pad(finished.logprobs, [(0, 0), (0, more_response)])
    return Rollout(state._replace(tokens=jnp.asarray(tokens, jnp.int32)), logprobs)


@pytest.fixture(scope="module")
def plain(compiled):
    return compiled(optimized=True)


@pytest.fixture(scope="module")
def plain_update(plain, batch):
    return plain.update(batch)


def test_micro_batches(plain_update, compiled, batch):
    assert_same_update(plain_update, compiled(num_microbatches=4).update(batch))


@pytest.mark.slow
def test_padding_and_packed_rows(
    plain_update, learner_of, compiled, network, rules, finished, batch
):
    """Lengths of 11, 3, 7 and 7 in rows of 18: two of the four rows; or of 11, in micro-batches."""
    limits = {"max_prompt_length": P + 4, "max_new_tokens": T + 3}
    learner = learner_of(network, dataclasses.replace(rules, **limits), num_packed_sizes=2)
    assert first_fit(finished.state.length, P + T + 7)[1] == 2
    wide = learner.prepare(widened(finished, 4, 3)).batch
    assert wide.tokens.shape == (4, P + T + 7)
    assert wide.mask.shape == (4, T + 3)
    assert not wide.mask[:, T:].any()
    for name in ("logprobs", "values", "advantages", "returns"):
        np.testing.assert_allclose(
            getattr(wide, name)[:, :T], getattr(batch, name), atol=2e-6, err_msg=name
        )
    result = learner.update(wide)
    assert_same_update(plain_update, result)
    assert result[1]["policy/first_ratio_max_error"] < 1e-5
    assert_same_update(plain_update, compiled(num_packed_sizes=2, num_microbatches=2).update(batch))


@pytest.mark.slow
def test_devices(plain_update, compiled, finished, batch):
    """Two rows on each, whole; one row a micro-batch, packed; one row a minibatch."""
    two = compiled(num_devices=2)
    chex.assert_trees_all_close(two.prepare(finished).batch, batch, rtol=0, atol=2e-6)
    result = two.update(batch)
    assert_same_update(plain_update, result)
    assert result[1]["policy/first_ratio_max_error"] < 1e-5
    packed = compiled(num_devices=2, num_packed_sizes=2, num_microbatches=2)
    assert_same_update(plain_update, packed.update(batch))
    cut = {"num_minibatches": 2, "advantage_whitening": "minibatch", "loss_aggregation": "sequence"}
    assert_same_update(compiled(**cut).update(batch), compiled(**cut, num_devices=2).update(batch))


@pytest.mark.slow
def test_shards(learner_of, make_network, rules, finished):
    """Two copies of two shards, with a separate critic, a moving reference, frozen parts, remat and
    packed rows; computed in bfloat16, they are no further apart than that type is from float32."""
    changes = {"critic": "separate", "ref_ema_decay": 0.9, "num_epochs": 2}
    changes |= {"freeze_embeddings": True, "num_frozen_layers": 1}
    cuts = {"num_devices": 4, "num_shards": 2, "num_packed_sizes": 2, "remat": True}

    def learners(dtype):
        network = make_network()
        network.backbone.dtype = jnp.dtype(dtype)
        return [learner_of(network, rules, **changes, **cut) for cut in ({}, cuts)]

    one, four = learners("float32")
    prepared = one.prepare(finished).batch
    chex.assert_trees_all_close(four.prepare(finished).batch, prepared, rtol=0, atol=2e-6)
    exact, result = one.update(prepared), four.update(prepared)
    assert_same_update(exact, result)
    assert result[1]["policy/first_ratio_max_error"] < 1e-5
    exact, *halved = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(state.params))])
        for state, *_ in (exact, *(learner.update(prepared) for learner in learners("bfloat16")))
    )
    rounding = np.linalg.norm(halved[0] - exact)
    assert 0 < np.linalg.norm(halved[1] - halved[0]) < rounding


@pytest.mark.parametrize(
    "changes",
    [
        {"num_packed_sizes": 2},
        {"critic": "separate", "advantage_whitening": "minibatch", "old_logprobs": "rollout"},
        {"critic": "stopped", "num_epochs": 1, "target_kl": 0.5, "entropy_coef": 0.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_gradients_of_the_first_epoch_from_the_pass_before_it(compiled, finished, changes):
    """They are those of a pass of its own."""
    learner = compiled(optimized=True, **changes)
    prepared = learner.prepare(finished)
    state, metrics, _ = learner.update(prepared.batch)
    at_once, more, _, tokens = learner.learn(finished)
    assert_same_update((state, prepared.metrics | metrics, None), (at_once, more, None))
    chex.assert_trees_all_close(tokens, prepared.tokens, rtol=0, atol=2e-6)
    if "old_logprobs" not in changes:
        assert more["policy/first_ratio_max_error"] == 0


def test_row_order(plain_update, plain, batch):
    shuffled = jax.tree.map(lambda x: x[np.array([2, 0, 3, 1])], batch)
    assert_same_update(plain_update, plain.update(shuffled))


CUT = {"num_minibatches": 2, "num_microbatches": 2, "num_epochs": 1, "temperature": 0.5}


@pytest.mark.parametrize("changes", [{"optimized": True}, CUT], ids=["whole", "cut"])
def test_the_first_ratio_is_one(compiled, finished, changes):
    """Where sampling is truncated: see test_whole_runs.py."""
    learner = compiled(**changes)
    _, metrics, _ = learner.update(learner.prepare(finished).batch)
    assert metrics["policy/first_ratio_max_error"] < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"num_microbatches": 2}, {"num_devices": 2}], ids=["whole", "cut", "devices"]
)
def test_one_odd_ratio_is_seen_whichever_part_holds_it(compiled, batch, changes):
    learner = compiled(**changes)
    largest_error = learner.compile(lambda *inputs: learner.learner.gradients(*inputs)[2])
    for row in (0, 3):
        odd = batch._replace(logprobs=batch.logprobs.at[row, 0].add(np.log(1.5)))
        error = largest_error(learner.start.params, odd)
        assert error == pytest.approx(1 / 3, abs=1e-5)  # of a ratio of two thirds


def test_decoding_and_training_are_apart_by_rounding(make_network, rules):
    """In bfloat16 by no more than either is from float32, up to a factor of two."""
    network = make_network()
    graphdef, params = nnx.split(network)
    rng = np.random.default_rng(0)
    prompts, lengths = rng.integers(10, 600, (64, P)), rng.integers(1, P + 1, 64)

    def of(dtype):
        network = nnx.merge(graphdef, params)
        network.backbone.dtype = jnp.dtype(dtype)
        return network

    def teacher_forced(dtype, state):
        arguments = state.tokens, state.prompt_length, state.length
        settings = {"rules": rules, "sampling": Sampling()}
        return response_outputs(of(dtype), *arguments, **settings).logprobs

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def gaps(key):
        result = {}
        for dtype in ("float32", "bfloat16"):
            episodes = rollout(of(dtype), prompts, lengths, key, rules=rules, sampling=Sampling())
            mask = jnp.arange(T) < mdp.response_length(episodes.state)[:, None]
            again = teacher_forced(dtype, episodes.state)
            exact = teacher_forced("float32", episodes.state)
            result[dtype] = [
                jnp.where(mask, jnp.abs(logprobs - other), 0).max()
                for logprobs, other in ((episodes.logprobs, again), (again, exact))
            ]
        return result

    measured = gaps(jax.random.key(0))
    gap, _ = measured["float32"]
    assert gap < 1e-5
    gap, rounding = measured["bfloat16"]
    assert 1e-3 < rounding < 0.1
    assert gap < 2 * rounding
