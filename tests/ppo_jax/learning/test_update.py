"""The update against PyTorch's, and what it does with what cannot be learnt from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_ppo import TorchPPO, as_tensors, parameters_in

from ppo_jax.algorithm import RATIO_EDGES, masked_histogram
from ppo_jax.models import save_pretrained
from ppo_jax.sampling import pack_bits

B, P, T = 4, 5, 6

# Every setting of the loss that changes what is computed; clips so narrow that all of them act.
EVERYTHING = {
    "num_minibatches": 2,
    "num_microbatches": 2,
    "num_epochs": 2,
    "temperature": 0.8,
    "top_p": 0.95,
    "loss_aggregation": "sequence",
    "clip_range": 0.1,
    "clip_range_high": 0.3,
    "dual_clip": 1.4,
    "value_clip_range": 0.2,
    "advantage_whitening": "minibatch",
    "critic": "separate",
}

# Nothing of the episodes is near the dual clip, but for what a test does to them.
ONE_EPOCH = {"num_minibatches": 2, "num_epochs": 1, "dual_clip": 3.0}


@pytest.fixture(scope="module")
def moved(batch, rules):
    """The batch, as if the policy and its values had moved since; drawn from parts of the ids."""
    rng = np.random.default_rng(2)
    noise, more = rng.normal(0, 0.4, (2, B, T)).astype(np.float32) * np.asarray(batch.mask)
    sampling_mask = rng.random((B, T, rules.vocab_size)) < 0.3
    sampling_mask[..., list(rules.forbidden_token_ids)] = False
    index = np.minimum(np.asarray(batch.prompt_length)[:, None] + np.arange(T), P + T - 1)
    tokens = np.take_along_axis(np.asarray(batch.tokens), index, axis=1)
    np.put_along_axis(sampling_mask, tokens[..., None], True, axis=-1)
    return batch._replace(
        # At temperature 0.8 and over a third of the ids, a token is about e times as probable.
        logprobs=jnp.where(batch.mask, batch.logprobs + 1 + noise, 0),
        values=batch.values + more,
        advantages=3 * batch.advantages + 1,
        sampling_mask=pack_bits(jnp.asarray(sampling_mask)),
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param(EVERYTHING, id="everything", marks=pytest.mark.slow),
    ],
)
def test_updates_equal_those_in_pytorch(
    rules, compiled, batch, moved, minibatches, changes, tmp_path
):
    """Several optimizer steps: clipped loss, value loss, entropy, gradient clip and AdamW."""
    learner = compiled(**changes, optimized=not changes)
    batch = moved if changes else batch
    state, metrics, _ = learner.update(batch)
    ppo = learner.ppo
    save_pretrained(learner.network, tmp_path / "before")
    theirs = TorchPPO(tmp_path / "before", rules, ppo, learner.optimizer, num_iterations=10)
    tensors = as_tensors(batch, batch.sampling_mask, rules.vocab_size)
    expected = theirs.update(tensors, minibatches(jax.random.key(0), ppo))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert metrics["policy/grad_norm"] > learner.optimizer.max_grad_norm, "the clip must act"
    save_pretrained(nnx.merge(learner.learner.graphdef, state.params), tmp_path / "after")
    before, after = parameters_in(tmp_path / "before"), parameters_in(tmp_path / "after")
    assert after.keys() == theirs.parameters.keys()
    for name, x in after.items():
        torch.testing.assert_close(x.double(), theirs.parameters[name].data, rtol=1e-5, atol=2e-6)
    assert max((after[name] - x).abs().max() for name, x in before.items()) > 1e-3


def test_everything_acts_in_that_batch(compiled, moved):
    """Or the comparison above would show little."""
    mask = np.asarray(moved.mask)
    learner = compiled(**EVERYTHING)
    start = learner.start
    new = learner.compile(learner.learner.response_outputs, static_argnames="layout")(
        start.params,
        moved.tokens,
        moved.prompt_length,
        moved.length,
        moved.sampling_mask,
        layout=None,
    )
    ratio = np.exp(new.logprobs - moved.logprobs)[mask]
    falls = np.asarray(moved.advantages < moved.advantages[moved.mask].mean())[mask]
    assert (ratio < 0.9).any() and (ratio > 1.3).any() and ((ratio > 0.9) & (ratio < 1.3)).any()
    assert (falls & (ratio > 1.4)).any(), "the dual clip"
    assert (np.abs(new.values - moved.values)[mask] > 0.2).any(), "the value clip"


def test_ratios_are_counted_over_all_minibatches(compiled, batch, moved):
    learner = compiled(**ONE_EPOCH)
    _, _, distributions = learner.update(batch)
    counts = np.asarray(distributions["ratio"])
    assert counts.sum() == batch.mask.sum()
    one = np.argmin(np.abs(RATIO_EDGES - 1))  # rounding puts a ratio of 1 on either side of 1
    assert counts[one - 1 : one + 1].sum() == batch.mask.sum()
    far = batch._replace(logprobs=moved.logprobs)
    _, _, distributions = learner.update(far)
    ratio = np.exp(batch.logprobs - far.logprobs)  # but for the step between the minibatches
    expected = masked_histogram(ratio, batch.mask, RATIO_EDGES)
    assert np.abs(np.asarray(distributions["ratio"]) - expected).sum() <= 4
    assert np.count_nonzero(distributions["ratio"]) > 4


def test_a_nonfinite_update_is_skipped_and_counted(compiled, batch, minibatches):
    learner = compiled(**ONE_EPOCH)
    poisoned = batch._replace(advantages=batch.advantages.at[0, 0].set(jnp.nan))
    state, metrics, _ = learner.update(poisoned)
    assert metrics["update/nonfinite"] == 1
    assert metrics["update/epochs"] == 0.5
    assert all(np.isfinite(float(x)) for x in metrics.values())
    chex.assert_tree_all_finite(state.params)
    # What is averaged is the other minibatch alone.
    [good] = [rows for rows in minibatches(jax.random.key(0), learner.ppo) if 0 not in rows]
    error = np.asarray(batch.values - batch.returns)[good][np.asarray(batch.mask)[good]]
    assert metrics["value/loss"] == pytest.approx(np.square(error).mean(), rel=1e-4)
    all_poisoned, two = batch._replace(advantages=batch.advantages * jnp.nan), jnp.int32(2)
    state, metrics, _ = learner.update(all_poisoned)
    assert metrics["update/nonfinite"] == state.nonfinite_in_a_row == 2
    chex.assert_trees_all_equal(state.params, learner.start.params)
    chex.assert_trees_all_equal(state.opt_state, learner.start.opt_state)
    assert state.iteration == 1
    again, _, _ = learner.update(all_poisoned, state=learner.start._replace(nonfinite_in_a_row=two))
    assert again.nonfinite_in_a_row == 4, "the row goes on from one iteration to the next"
    again, _, _ = learner.update(batch, state=learner.start._replace(nonfinite_in_a_row=two))
    assert again.nonfinite_in_a_row == 0, "a finite one ends it"


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped_as_well(compiled, batch):
    """Of a loss of 1e34 through a value head of 1e10: the square of the gradient is no number.

    Each row has one, so both minibatches do.
    """
    learner = compiled(**ONE_EPOCH)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 1e10 * x if "value_head" in jax.tree_util.keystr(path) else x,
        learner.start.params,
    )
    start = learner.start._replace(params=params)
    values = learner.compile(learner.learner.response_outputs)(
        start.params, batch.tokens, batch.prompt_length, batch.length
    ).values
    odd = batch._replace(returns=values + 1e17)
    state, metrics, _ = learner.update(odd, state=start)
    assert np.isfinite(metrics["value/loss"])
    assert metrics["update/nonfinite"] == 2
    chex.assert_trees_all_equal(state.params, start.params)
    chex.assert_trees_all_equal(state.opt_state, start.opt_state)


def test_a_ratio_beyond_all_reason_spoils_no_step(compiled, batch):
    """Its log-ratio of 99 would be infinite; clamped, the token has no gradient, and is counted."""
    odd = batch._replace(
        logprobs=batch.logprobs.at[:, 0].add(-99), advantages=batch.advantages.at[:, 0].set(-1)
    )
    learner = compiled(**ONE_EPOCH)
    state, metrics, distributions = learner.update(odd)
    assert all(np.isfinite(float(x)) for x in metrics.values())
    assert metrics["update/nonfinite"] == 0
    assert state.opt_state.count == 2
    assert 4 / batch.mask.sum() < metrics["policy/clamped_fraction"] < 1
    assert metrics["policy/clip_active_fraction"] >= metrics["policy/clamped_fraction"]
    assert distributions["ratio"][-1] == 4


def test_minibatches_are_drawn_in_an_order_that_the_key_decides(compiled, batch):
    learner = compiled(**ONE_EPOCH)
    one, same = learner.update(batch, seed=0), learner.update(batch, seed=0)
    chex.assert_trees_all_equal(one[0].params, same[0].params)
    losses = {float(learner.update(batch, seed=seed)[1]["value/loss"]) for seed in range(8)}
    assert len(losses) > 1


def test_the_state_carries_on(compiled, batch):
    """What a next iteration needs is all there, and nothing else has changed."""
    learner = compiled(**ONE_EPOCH)
    state, _, _ = learner.update(batch)
    assert state.iteration == 1
    assert state.opt_state.count == 2
    assert state.reference is None
    chex.assert_trees_all_equal(state.controls, learner.start.controls)
    chex.assert_trees_all_equal(state.root_key, learner.start.root_key)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, learner.start)
