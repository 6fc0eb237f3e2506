import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import generalized_advantage_estimation as gae

compiled_gae = jax.jit(gae)  # where a test calls it many times
quick = settings(deadline=None, max_examples=60, derandomize=True)


def reference_loop(rewards, values, dones, last_value, gamma, lam):
    """The original listing's backward loop over one row without holes, in float64."""
    advantages = np.zeros(len(rewards))
    running = 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(rewards) else last_value
        delta = rewards[t] + gamma * next_value * (1 - dones[t]) - values[t]
        running = delta + gamma * lam * (1 - dones[t]) * running
        advantages[t] = running
    return advantages


rlax_gae = jax.jit(rlax.truncated_generalized_advantage_estimation)


def rlax_row(rewards, values, dones, last_value, gamma, lam):
    return rlax_gae(
        jnp.asarray(rewards),
        jnp.asarray(gamma * (1 - dones), jnp.float32),
        lam,
        jnp.append(values, last_value),
    )


def random_batch(seed, rows=6, length=9, hole_rate=0.3, end_rate=0.3):
    """Ragged rows with holes, several endings in some rows, cut off in others."""
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    mask = np.arange(length) < rng.integers(0, length + 1, rows)[:, None]
    mask &= rng.random(shape) > hole_rate
    return {
        "rewards": rng.normal(size=shape).astype(np.float32),
        "values": rng.normal(size=shape).astype(np.float32),
        "terminated": rng.random(shape) < end_rate,
        "last_value": rng.normal(size=rows).astype(np.float32),
        "mask": mask,
    }


def positional(batch):
    return batch["rewards"], batch["values"], batch["terminated"], batch["last_value"]


class GoldenTest(chex.TestCase):
    """γ = λ = 1/2, so γλ = 1/4; every number below is exact in binary."""

    rewards = np.array([[1.0, 2.0, 3.0]], np.float32)
    values = np.ones((1, 3), np.float32)
    last_value = np.array([2.0], np.float32)

    def check(self, terminated, advantages, **changed):
        function = self.variant(lambda *args: gae(*args, gamma=0.5, gae_lambda=0.5))
        result = function(self.rewards, self.values, np.array([terminated]), self.last_value)
        np.testing.assert_array_equal(result[0], [advantages])
        np.testing.assert_array_equal(result[1], np.array([advantages]) + self.values)

    @chex.variants(with_jit=True, without_jit=True)
    def test_truncated(self):
        # δ = (1 + 1/2 - 1, 2 + 1/2 - 1, 3 + 2/2 - 1) = (1/2, 3/2, 3)
        self.check([False, False, False], [0.5 + 2.25 / 4, 1.5 + 3 / 4, 3.0])

    @chex.variants(with_jit=True, without_jit=True)
    def test_terminated_at_the_end(self):
        # δ = (1/2, 3/2, 3 - 1): last_value plays no part
        self.check([False, False, True], [0.5 + 2 / 4, 1.5 + 2 / 4, 2.0])

    @chex.variants(with_jit=True, without_jit=True)
    def test_terminated_in_the_middle(self):
        # δ = (1/2, 2 - 1, 3), and nothing passes from step 2 to step 1
        self.check([False, True, False], [0.5 + 1 / 4, 1.0, 3.0])

    @chex.variants(with_jit=True, without_jit=True)
    def test_holes_and_padding(self):
        function = self.variant(lambda *args, m: gae(*args, mask=m, gamma=0.5, gae_lambda=0.5))
        nan = np.nan
        advantages, returns = function(
            np.array([[nan, 1.0, 2.0, nan, nan, 3.0, nan]], np.float32),
            np.array([[nan, 1.0, 1.0, nan, nan, 1.0, nan]], np.float32),
            np.array([[True, False, False, True, False, False, True]]),
            self.last_value,
            m=np.array([[False, True, True, False, False, True, False]]),
        )
        np.testing.assert_array_equal(advantages, [[0, 1.0625, 2.25, 0, 0, 3, 0]])
        np.testing.assert_array_equal(returns, [[0, 2.0625, 3.25, 0, 0, 4, 0]])


@pytest.mark.parametrize("independent", [reference_loop, rlax_row])
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_agrees_with_independent_sources_on_the_valid_steps(independent, gamma, lam):
    for seed in range(4):
        batch = random_batch(seed)
        mask = batch["mask"]
        advantages, returns = compiled_gae(
            *positional(batch), mask=mask, gamma=gamma, gae_lambda=lam
        )
        assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
        for row, kept in enumerate(mask):
            rewards, values, ends = (x[row, kept] for x in positional(batch)[:3])
            last_value = batch["last_value"][row]
            expected = independent(rewards, values, ends, last_value, gamma, lam)
            np.testing.assert_allclose(advantages[row, kept], expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(returns[row, kept], expected + values, rtol=1e-5, atol=1e-5)


def test_defaults_are_the_reference_hyperparameters():
    batch = random_batch(0)
    chex.assert_trees_all_equal(
        gae(*positional(batch)), gae(*positional(batch), gamma=0.99, gae_lambda=0.95)
    )


def test_without_a_mask_every_step_is_real():
    batch = random_batch(1)
    everything = np.ones_like(batch["mask"])
    chex.assert_trees_all_equal(gae(*positional(batch)), gae(*positional(batch), mask=everything))


@quick
@given(st.integers(0, 10_000), st.data())
def test_where_the_invalid_steps_stand_makes_no_difference(seed, data):
    """Rows written without holes, and the same rows spread out over twice the length."""
    packed = random_batch(seed, rows=2, length=4, hole_rate=0.0)
    spread = random_batch(seed + 1, rows=2, length=8)
    spread["last_value"] = packed["last_value"]
    spread["mask"][:] = False
    places = []
    for row in range(2):
        place = data.draw(st.lists(st.integers(0, 7), min_size=4, max_size=4, unique=True))
        places.append(sorted(place))
        for name in ("rewards", "values", "terminated", "mask"):
            spread[name][row, places[row]] = packed[name][row]
    for a, b in zip(
        compiled_gae(*positional(packed), mask=packed["mask"]),
        compiled_gae(*positional(spread), mask=spread["mask"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, np.take_along_axis(np.asarray(b), np.array(places), 1))


@quick
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_an_exponential_average_of_k_step_estimates(seed, gamma, lam):
    """Aₜ = (1-λ) Σ_{k<n} λᵏ⁻¹ Âᵏ + λⁿ⁻¹ Âⁿ, where n steps remain and Âᵏ looks k steps ahead."""
    rng = np.random.default_rng(seed)
    length = 5
    rewards, values = rng.normal(size=(2, length))
    last_value = rng.normal()
    boundary = np.append(values, last_value)
    k_step = [
        sum(gamma**i * rewards[i] for i in range(k)) + gamma**k * boundary[k] - values[0]
        for k in range(1, length + 1)
    ]
    weights = [(1 - lam) * lam ** (k - 1) for k in range(1, length)] + [lam ** (length - 1)]
    advantages, _ = compiled_gae(
        rewards[None],
        values[None],
        np.zeros((1, length), bool),
        np.array([last_value]),
        gamma=gamma,
        gae_lambda=lam,
    )
    np.testing.assert_allclose(advantages[0, 0], np.dot(weights, k_step), rtol=1e-4, atol=1e-5)


def test_lambda_one_returns_are_discounted_rewards():
    batch = random_batch(3, end_rate=0.0)
    gamma = 0.9
    _, returns = gae(*positional(batch), gamma=gamma, gae_lambda=1.0)
    length = batch["rewards"].shape[1]
    for t in range(length):
        powers = gamma ** np.arange(length - t)
        expected = batch["rewards"][:, t:] @ powers + gamma ** (length - t) * batch["last_value"]
        np.testing.assert_allclose(returns[:, t], expected, rtol=1e-5, atol=1e-5)


def test_garbage_reaches_neither_value_nor_gradient():
    clean = random_batch(5)
    mask = clean["mask"]
    clean |= {name: np.where(mask, clean[name], 0) for name in ("rewards", "values")}
    garbage = {"rewards": [np.nan, np.inf, -np.inf], "values": [np.inf, np.nan, np.inf, np.nan]}
    dirty = clean | {
        name: np.where(mask, clean[name], np.resize(garbage[name], mask.shape)) for name in garbage
    }

    def loss(rewards, values, last_value, terminated):
        advantages, returns = gae(rewards, values, terminated, last_value, mask=mask)
        return jnp.sum(jnp.exp(advantages / 5)) + jnp.sum(returns**2)

    def value_and_gradients(batch):
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(
            *(jnp.asarray(batch[k]) for k in ("rewards", "values", "last_value", "terminated"))
        )

    result = value_and_gradients(dirty)
    chex.assert_tree_all_finite(result)
    chex.assert_trees_all_equal(result, value_and_gradients(clean))
    for gradient in result[1][:2]:
        assert (gradient[~mask] == 0).all()


def test_last_value_of_a_terminated_row_is_never_looked_at():
    batch = random_batch(2, hole_rate=0.0)
    batch["terminated"][:] = True
    batch["last_value"][:] = np.nan
    chex.assert_tree_all_finite(gae(*positional(batch), mask=batch["mask"]))


def test_a_row_without_valid_steps_is_zero():
    batch = random_batch(0)
    batch["mask"][2] = False
    for result in gae(*positional(batch), mask=batch["mask"]):
        assert (result[2] == 0).all()


def test_whole_number_and_half_precision_inputs_become_float32():
    batch = random_batch(4)
    rewards = np.arange(54).reshape(6, 9) % 5
    expected = gae(rewards.astype(np.float32), *positional(batch)[1:])
    for dtype in (np.int32, jnp.bfloat16):
        result = gae(jnp.asarray(rewards, dtype), *positional(batch)[1:])
        assert {x.dtype for x in result} == {jnp.dtype(jnp.float32)}
        chex.assert_trees_all_equal(result, expected)


def test_discounts_can_be_traced_without_recompiling():
    batch = random_batch(0)

    @jax.jit
    @chex.assert_max_traces(1)
    def traced_once(gamma, lam):
        return gae(*positional(batch), mask=batch["mask"], gamma=gamma, gae_lambda=lam)

    for gamma, lam in ((0.99, 0.95), (1.0, 0.5), (0.0, 1.0)):
        chex.assert_trees_all_close(
            traced_once(gamma, lam),
            gae(*positional(batch), mask=batch["mask"], gamma=gamma, gae_lambda=lam),
            rtol=1e-6,
        )


def test_vmap_over_lambda():
    batch = random_batch(0)
    lambdas = jnp.array([0.0, 0.5, 1.0])
    stacked = jax.vmap(lambda lam: gae(*positional(batch), gae_lambda=lam))(lambdas)
    for i, lam in enumerate((0.0, 0.5, 1.0)):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], stacked),
            gae(*positional(batch), gae_lambda=lam),
            rtol=1e-6,
        )


@pytest.mark.parametrize("name", ["rewards", "values", "terminated", "last_value", "mask"])
def test_a_wrong_shape_is_refused(name):
    batch = random_batch(0)
    batch[name] = batch[name][:-1]
    with pytest.raises(AssertionError, match="shape"):
        inspect.unwrap(gae)(*positional(batch), mask=batch["mask"])
