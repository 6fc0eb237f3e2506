"""Passes of the critic's own, and a warm-up that ends by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.config import OptimizerConfig
from ppo_jax.learning.batch import explained_variance
from ppo_jax.learning.critic_warmup import begin_warmup, go_on
from ppo_jax.learning.metrics import Quotient

SEPARATE = {
    "max_grad_norm": 1e9,
    "weight_decay": 0.1,
    "critic": "separate",
    "num_minibatches": 2,
    "num_microbatches": 2,
}
# So that what a stopped critic reads stays as it is.
STOPPED = {"max_grad_norm": 1e9, "critic": "stopped", "critic_warmup_iterations": 3}


def parts(state):
    """Parameters and moments of the policy, and of the critic."""
    trees = state.params, state.opt_state.mu, state.opt_state.nu
    policy = [tree["backbone"] for tree in trees]
    critic = [{n: x for n, x in tree.items() if n != "backbone"} for tree in trees]
    return jax.device_get((policy, critic))


@pytest.mark.parametrize("settings", [SEPARATE, STOPPED], ids=["separate", "stopped"])
def test_the_critics_passes_are_those_of_a_longer_run_the_policys_of_a_shorter(
    compiled, batch, settings
):
    """With a separate critic nothing of the one is in the other; a stopped one reads the policy."""
    learner = compiled(**settings, num_epochs=1, critic_epochs=3)
    both = learner.update(batch)[0]
    chex.assert_trees_all_equal_structs(both, learner.start)  # so that it goes on
    policy, _ = parts(compiled(**settings, num_epochs=1).update(batch)[0])
    _, critic = parts(compiled(**settings, num_epochs=3).update(batch)[0])
    ours = parts(both)
    chex.assert_trees_all_equal(ours[0], policy)
    chex.assert_trees_all_close(ours[1], critic, rtol=1e-5, atol=1e-7)
    counts = both.opt_state.count, both.opt_state.critic_count
    assert counts == ((2, 6) if settings is SEPARATE else (0, 3))


def test_fewer_passes_than_the_policys(compiled, batch):
    both = compiled(**SEPARATE, num_epochs=3, critic_epochs=1).update(batch)[0]
    policy, _ = parts(compiled(**SEPARATE, num_epochs=3).update(batch)[0])
    _, critic = parts(compiled(**SEPARATE, num_epochs=1).update(batch)[0])
    chex.assert_trees_all_close(parts(both), (policy, critic), rtol=1e-5, atol=1e-7)
    assert (both.opt_state.count, both.opt_state.critic_count) == (6, 2)


def test_an_early_stop_ends_the_policys_passes_alone(compiled, batch):
    learner = compiled(**SEPARATE, num_epochs=3, critic_epochs=3, target_kl=1e-9)
    state, metrics, _ = learner.update(batch)
    assert metrics["update/early_stopped"] == 1
    assert state.opt_state.count == 1  # the second minibatch's step is refused to both
    assert state.opt_state.critic_count == 5


def test_on_several_devices(compiled, batch):
    settings = SEPARATE | {"num_microbatches": 1, "num_devices": 2, "num_shards": 2}
    cut = compiled(**settings, num_epochs=1, critic_epochs=3).update(batch)[0]
    alone = compiled(**SEPARATE, num_epochs=1, critic_epochs=3).update(batch)[0]
    chex.assert_trees_all_close(parts(cut), parts(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_critic_with_bins_in_one_program(compiled, finished, num_microbatches):
    """Whether or not the pass that gives the old values gives the first gradients too."""
    learner = compiled(
        max_grad_norm=1e9,
        num_epochs=1,
        critic="separate",
        value_loss="hl_gauss",
        value_range=(-4.0, 4.0),
        num_microbatches=num_microbatches,
    )
    state, metrics, *_ = learner.learn(finished)
    prepared = learner.prepare(finished)
    returns = np.asarray(prepared.batch.returns)[np.asarray(prepared.batch.mask)]
    assert metrics["value/out_of_range_fraction"] == pytest.approx((abs(returns) > 4).mean())
    np.testing.assert_allclose(prepared.batch.values, 0.0, atol=1e-6)  # the middle
    expected, other, _ = learner.update(prepared.batch)
    assert metrics["value/loss"] == pytest.approx(float(other["value/loss"]), rel=1e-5)
    chex.assert_trees_all_close(parts(state), parts(expected), rtol=1e-3, atol=1e-6)


def test_a_critic_with_bins_learns_to_say_the_returns(compiled, batch):
    settings = {
        "critic": "separate",
        "critic_epochs": 40,
        "num_epochs": 1,
        "value_loss": "hl_gauss",
        "value_range": (-4.0, 4.0),
        "value_bins": 33,
        "learning_rate": 3e-3,
    }
    learner = compiled(**settings)
    state, metrics, _ = learner.update(batch)
    assert metrics["value/loss"] == pytest.approx(np.log(33), rel=1e-5)  # all bins alike at first
    _, after, _ = learner.update(batch, state=state)
    assert after["value/loss"] < 0.8 * np.log(33)


class TestWarmup:
    CONFIG = OptimizerConfig(critic_warmup_iterations=8, critic_warmup_patience=2)

    def starts(self, shares):
        warmup, starts = begin_warmup(self.CONFIG), []
        for i, share in enumerate(shares):
            defined = 0.0 if share is None else 2.0
            explained = Quotient(jnp.float32(2 * (share or 0)), jnp.float32(defined))
            warmup = go_on(warmup, jnp.int32(i), explained, self.CONFIG.critic_warmup_patience)
            starts.append(int(warmup.policy_start))
        return starts

    @pytest.mark.parametrize(
        ("shares", "start"),
        [
            ([0.0, 0.1, 0.2, 0.2, 0.15, 0.9, 0.9, 0.9, 0.9, 0.9], 4),
            ([0.0, 0.1, 0.05, 0.2, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7], 8),  # as long as it may last
            ([None, None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 1),  # all returns alike
            ([-0.5, -0.2, -0.1, -0.3, -0.4, 0.0, 0.0, 0.0, 0.0, 0.0], 4),
        ],
    )
    def test_it_ends_where_explained_variance_stops_rising(self, shares, start):
        starts = self.starts(shares)
        assert starts[-1] == start
        assert starts == [8] * start + [start] * (10 - start)  # and that stands

    def test_in_an_update(self, compiled, batch):
        """On one batch, whose values are given, explained variance never rises again."""
        learner = compiled(
            critic="separate",
            num_epochs=1,
            critic_warmup_iterations=8,
            critic_warmup_patience=2,
            schedule="linear",
        )
        state, counts, rates = learner.start, [], []
        for _ in range(4):
            state, metrics, _ = learner.update(batch, state=state)
            counts.append((int(state.opt_state.count), int(state.opt_state.critic_count)))
            rates.append(float(metrics["policy/learning_rate"]))
        assert counts == [(0, 1), (0, 2), (1, 3), (2, 4)]
        np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-3, 7e-3 / 8], rtol=1e-5)
        explained = explained_variance(batch.values, batch.returns, batch.mask)
        assert state.warmup.best == pytest.approx(
            float(explained.numerator / explained.denominator), rel=1e-5
        )
