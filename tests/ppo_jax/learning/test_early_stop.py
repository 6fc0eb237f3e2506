"""The KL early stop at both grains, and what it leaves undone."""

import dataclasses

import chex
import numpy as np
import pytest

from ppo_jax.algorithm import approx_kl, token_weights
from ppo_jax.learning.loss import ppo_loss

STOPPING = {"num_minibatches": 2, "num_epochs": 3, "target_kl": 0.5}


def as_if_moved(batch, by, rows=slice(None)):
    """The batch, as if the policy had since moved by KL(old‖new) ≈ exp(-by) - 1 + by a token.

    Where its own steps move it by less than a hundredth, that is what the early stop sees.
    """
    return batch._replace(logprobs=batch.logprobs.at[rows].add(by) * batch.mask)


def test_kl_early_stop_takes_no_step_beyond_the_target(compiled, batch):
    one_epoch, _, _ = compiled(num_epochs=1).update(batch)
    stopped, metrics, _ = compiled(num_epochs=6, target_kl=1e-9).update(batch)
    assert metrics["update/early_stopped"] == 1
    assert metrics["update/epochs"] == 1
    chex.assert_trees_all_close(stopped.params, one_epoch.params, rtol=1e-6, atol=1e-7)
    assert stopped.opt_state.count == one_epoch.opt_state.count == 1
    _, metrics, _ = compiled().update(batch)
    assert metrics["update/early_stopped"] == 0
    assert metrics["update/epochs"] == compiled().ppo.num_epochs


@pytest.mark.parametrize("grain", ["minibatch", "epoch"])
def test_below_the_target_every_step_is_taken(compiled, batch, grain):
    state, metrics, _ = compiled(**STOPPING, target_kl_grain=grain).update(batch)
    assert 0 < metrics["policy/approx_kl"] < 0.01
    assert metrics["update/early_stopped"] == 0
    assert metrics["update/epochs"] == 3
    assert state.opt_state.count == 6


def test_at_the_grain_of_minibatches_the_first_one_beyond_is_not_taken(compiled, batch):
    learner = compiled(**STOPPING, target_kl_grain="minibatch")
    state, metrics, _ = learner.update(as_if_moved(batch, 2.0))
    chex.assert_trees_all_equal(state.params, learner.start.params)
    chex.assert_trees_all_equal(state.opt_state, learner.start.opt_state)
    assert metrics["update/early_stopped"] == 1
    assert metrics["update/epochs"] == 0
    # The KL that stopped it is what is reported, of a shift by 2 of every token.
    np.testing.assert_allclose(metrics["policy/approx_kl"], np.exp(-2) - 1 + 2, rtol=1e-4)
    # One row alone is beyond it: the stop comes with the minibatch that holds it.
    counts = set()
    for seed in range(6):
        state, metrics, _ = learner.update(as_if_moved(batch, 2.0, rows=0), seed=seed)
        assert metrics["update/early_stopped"] == 1
        assert metrics["update/epochs"] == state.opt_state.count / 2
        counts.add(int(state.opt_state.count))
    assert counts == {0, 1}


def test_at_the_grain_of_epochs_the_epoch_is_finished(compiled, batch):
    learner = compiled(**STOPPING, target_kl_grain="epoch")
    state, metrics, _ = learner.update(as_if_moved(batch, 2.0))
    assert metrics["update/early_stopped"] == 1
    assert metrics["update/epochs"] == 1
    assert state.opt_state.count == 2


def test_a_minibatch_without_a_kl_does_not_hide_that_of_its_epoch(compiled, batch):
    learner = compiled(**STOPPING, target_kl_grain="epoch")
    moved = as_if_moved(batch, 2.0)
    moved = moved._replace(logprobs=moved.logprobs.at[0, 0].set(np.nan))
    _, metrics, _ = learner.update(moved)
    assert metrics["update/nonfinite"] == 1
    assert metrics["update/early_stopped"] == 1


def test_behind_the_last_epoch_there_is_nothing_to_stop(compiled, batch):
    learner = compiled(**STOPPING | {"num_epochs": 1}, target_kl_grain="epoch")
    moved = as_if_moved(batch, 2.0)
    _, metrics, _ = learner.update(moved)
    assert metrics["update/early_stopped"] == 0
    assert metrics["update/epochs"] == 1
    # A minibatch that was skipped for another reason does not make it an early stop.
    advantages = moved.advantages.at[0, 0].set(np.nan)
    _, metrics, _ = learner.update(moved._replace(advantages=advantages))
    assert metrics["update/nonfinite"] == 1
    assert metrics["update/early_stopped"] == 0
    assert metrics["update/epochs"] == 0.5


def test_at_the_grain_of_epochs_the_mean_over_the_minibatches_decides(compiled, batch):
    """Of one row's shift: its minibatch is beyond the target; the epoch is not, or is as well."""
    moved, far = as_if_moved(batch, 1.7, rows=0), as_if_moved(batch, 3.0, rows=0)
    old, new, mask = moved.logprobs, batch.logprobs, batch.mask
    for other in (1, 2, 3):  # the row that shares a minibatch with row 0, and the two that do not
        both, rest = np.array([0, other]), np.array([row for row in (1, 2, 3) if row != other])
        first, second = (approx_kl(old[rows], new[rows], mask[rows]) for rows in (both, rest))
        assert first > 0.51 and (first + second) / 2 < 0.49
        assert approx_kl(far.logprobs[both], new[both], mask[both]) / 2 > 0.51
    _, metrics, _ = compiled(**STOPPING, target_kl_grain="minibatch").update(moved)
    assert metrics["update/early_stopped"] == 1
    learner = compiled(**STOPPING, target_kl_grain="epoch")
    for seed in range(6):  # whether the row comes first in an epoch or last
        state, metrics, _ = learner.update(moved, seed=seed)
        assert metrics["update/early_stopped"] == 0
        assert state.opt_state.count == 6
        state, metrics, _ = learner.update(far, seed=seed)
        assert metrics["update/early_stopped"] == 1
        assert state.opt_state.count == 2


def test_the_estimator_that_decides_is_the_one_that_was_asked_for(compiled, batch):
    plain = compiled(loss_aggregation="sequence")
    estimators = "k1", "k2", "k3", "reference"
    noise = np.random.default_rng(0).normal(0, 0.5, batch.mask.shape).astype(np.float32)
    moved = batch._replace(logprobs=(batch.logprobs + noise) * batch.mask)
    weights = token_weights(batch.mask, "sequence")
    outputs = plain.compile(plain.learner.response_outputs)(
        plain.start.params, moved.tokens, moved.prompt_length, moved.length
    )
    results = [
        ppo_loss(
            outputs,
            moved,
            weights,
            dataclasses.replace(plain.ppo, target_kl=0.1, target_kl_estimator=estimator),
        )[1][0].stop_kl
        for estimator in estimators
    ]
    for estimator, result in zip(estimators, results, strict=True):
        expected = approx_kl(moved.logprobs, batch.logprobs, batch.mask, estimator, weights=weights)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6, err_msg=estimator)
    assert np.ptp(results) > 0.01
