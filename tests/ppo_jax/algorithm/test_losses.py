"""Losses and their gradients, against PyTorch's autograd on the valid tokens alone."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import (
    clipped_policy_loss,
    masked_mean,
    token_weights,
    total_loss,
    value_loss,
)

SHAPE = (4, 6)
VOCABULARY = 9
quick = settings(deadline=None, max_examples=40, derandomize=True)
compiled_policy_loss = jax.jit(clipped_policy_loss)


def random_batch(seed):
    """Everything that a minibatch holds, and logits that have moved away from the old policy."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    logits = normal(*SHAPE, VOCABULARY)
    actions = rng.integers(0, VOCABULARY, SHAPE)
    old = jax.nn.log_softmax(logits + 0.3 * normal(*SHAPE, VOCABULARY))
    return {
        "logits": logits,
        "actions": actions,
        "old_logprobs": np.take_along_axis(np.asarray(old), actions[..., None], -1)[..., 0],
        "advantages": normal(*SHAPE),
        "values": normal(*SHAPE),
        "old_values": normal(*SHAPE),
        "returns": normal(*SHAPE),
        "mask": rng.random(SHAPE) < 0.7,
    }


def jax_losses(logits, values, batch, *, value_clip=None, weights=None):
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, batch["actions"][..., None], axis=-1)[..., 0]
    mask = batch["mask"]
    policy = clipped_policy_loss(
        chosen, batch["old_logprobs"], batch["advantages"], mask, weights=weights
    )
    value = value_loss(
        values,
        batch["returns"],
        mask,
        old_values=None if value_clip is None else batch["old_values"],
        clip_range=value_clip,
        weights=weights,
    )
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    entropy = masked_mean(entropy, mask, weights=weights)
    total = total_loss(policy.loss, value, entropy, value_coef=0.5, entropy_coef=0.01)
    return total, (policy.loss, policy.clip_fraction, value, entropy)


def torch_losses(logits, values, batch, *, value_clip=None, clip=0.2):
    valid = torch.tensor(batch["mask"])
    pick = lambda name: torch.tensor(batch[name])[valid]  # noqa: E731
    policy = torch.distributions.Categorical(logits=logits[valid])
    ratio = torch.exp(policy.log_prob(pick("actions")) - pick("old_logprobs"))
    advantages = pick("advantages")
    unclipped, clipped = advantages * ratio, advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
    policy_loss = -torch.min(unclipped, clipped).mean()
    clip_fraction = ((ratio - 1.0).abs() > clip).float().mean()
    values = values[valid]
    if value_clip is None:
        value = torch.nn.functional.mse_loss(values, pick("returns"))
    else:
        moved = torch.clamp(values - pick("old_values"), -value_clip, value_clip)
        kept = pick("old_values") + moved
        errors = ((values - pick("returns")) ** 2, (kept - pick("returns")) ** 2)
        value = torch.max(*errors).mean()
    entropy = policy.entropy().mean()
    return policy_loss + 0.5 * value - 0.01 * entropy, (policy_loss, clip_fraction, value, entropy)


@pytest.mark.parametrize("value_clip", [None, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_agree_with_pytorch(seed, value_clip):
    batch = random_batch(seed)
    logits = torch.tensor(batch["logits"], requires_grad=True)
    values = torch.tensor(batch["values"], requires_grad=True)
    expected, expected_parts = torch_losses(logits, values, batch, value_clip=value_clip)
    expected.backward()

    (total, parts), gradients = jax.value_and_grad(jax_losses, argnums=(0, 1), has_aux=True)(
        batch["logits"], batch["values"], batch, value_clip=value_clip
    )
    np.testing.assert_allclose(total, expected.item(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(parts, expected_parts, strict=True):
        np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[0], logits.grad, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradients[1], values.grad, rtol=1e-4, atol=1e-7)
    assert 0 < parts[1] < 1


class GoldenTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_policy_loss_by_hand(self):
        ratio = np.array([1.0, 1.5, 0.5, 1.5, 0.5, 2.0], np.float32)
        advantages = np.array([3.0, 2.0, 2.0, -2.0, -2.0, 9.0], np.float32)
        mask = np.array([1, 1, 1, 1, 1, 0], bool)
        # min(ρA, clip(ρ)A) is 3, 1.2·2, 0.5·2, -1.5·2, -0.8·2; four of five lie outside 1 ± 0.2
        loss, clip_fraction = self.variant(clipped_policy_loss)(
            np.log(ratio), np.zeros(6, np.float32), advantages, mask
        )
        assert loss == pytest.approx(-(3 + 2.4 + 1 - 3 - 1.6) / 5, rel=1e-6)
        assert clip_fraction == pytest.approx(0.8)

    @chex.variants(with_jit=True, without_jit=True)
    def test_value_loss_by_hand(self):
        values = np.array([[1.0, 2.0, 9.0]], np.float32)
        returns = np.array([[3.0, 2.5, 0.0]], np.float32)
        old_values = np.array([[0.0, 2.0, 5.0]], np.float32)
        mask = np.array([[True, True, False]])
        assert self.variant(value_loss)(values, returns, mask) == (4 + 0.25) / 2
        # Kept within 1/2 of the old values, the values are 1/2 and 2.
        clipped = self.variant(value_loss)(
            values, returns, mask, old_values=old_values, clip_range=0.5
        )
        assert clipped == (6.25 + 0.25) / 2

    @chex.variants(with_jit=True, without_jit=True)
    def test_total_loss_by_hand(self):
        total = self.variant(total_loss)(2.0, 3.0, 4.0, value_coef=0.5, entropy_coef=0.25)
        assert total == 2.0 + 1.5 - 1.0


def test_policy_loss_agrees_with_rlax():
    rng = np.random.default_rng(0)
    log_ratio, advantages = rng.normal(size=(2, 50)).astype(np.float32)

    def ours(x):
        return clipped_policy_loss(
            x, jnp.zeros(50), advantages, jnp.ones(50, bool), clip_range=0.3
        ).loss

    def theirs(x):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(x), jnp.asarray(advantages), 0.3)

    for a, b in zip(
        jax.value_and_grad(ours)(log_ratio), jax.value_and_grad(theirs)(log_ratio), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True)],
)
def test_gradient_vanishes_where_the_ratio_has_moved_far_enough(ratio, advantage, moves):
    def loss(x):
        return clipped_policy_loss(
            x, jnp.zeros(1), jnp.array([float(advantage)]), jnp.ones(1, bool)
        ).loss

    gradient = jax.grad(loss)(jnp.log(jnp.array([ratio])))[0]
    assert gradient == pytest.approx(-advantage * ratio if moves else 0, rel=1e-5, abs=1e-9)


def test_gradient_at_the_edge_of_the_range_is_whole():
    one = jnp.ones(1)

    def loss(x):
        return clipped_policy_loss(x, 0 * one, 3 * one, one, clip_range=0.0).loss

    assert jax.grad(loss)(0 * one)[0] == -3


def test_before_any_update_the_gradient_is_the_policy_gradient():
    batch = random_batch(0)
    mask, advantages = batch["mask"], batch["advantages"]

    def loss(x):
        return clipped_policy_loss(x, batch["old_logprobs"], advantages, mask)

    result = loss(batch["old_logprobs"])
    np.testing.assert_allclose(result.loss, -advantages[mask].mean(), rtol=1e-5)
    assert result.clip_fraction == 0
    gradient = jax.grad(lambda x: loss(x).loss)(batch["old_logprobs"])
    np.testing.assert_allclose(gradient, np.where(mask, -advantages / mask.sum(), 0), rtol=1e-5)


@quick
@given(st.integers(0, 10_000), st.floats(0.01, 0.9))
def test_the_clipped_loss_is_never_below_the_unclipped(seed, clip_range):
    batch = random_batch(seed)
    new = batch["old_logprobs"] + batch["values"]
    clipped = compiled_policy_loss(
        new, batch["old_logprobs"], batch["advantages"], batch["mask"], clip_range=clip_range
    )
    unclipped = -masked_mean(np.exp(batch["values"]) * batch["advantages"], batch["mask"])
    assert clipped.loss >= unclipped - 1e-5
    outside = np.abs(np.exp(batch["values"]) - 1)[batch["mask"]] > clip_range
    np.testing.assert_allclose(clipped.clip_fraction, outside.mean(), rtol=1e-5)


@pytest.mark.parametrize("cut", [[(0, 1), (1, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]])
def test_micro_batches_add_up(cut):
    """However a minibatch is cut, losses and gradients are those of the whole."""
    batch = random_batch(0)
    batch["mask"][1] = False  # a micro-batch without a valid token counts for nothing
    differentiate = jax.jit(
        jax.value_and_grad(partial(jax_losses, value_clip=0.2), argnums=(0, 1), has_aux=True)
    )
    (total, parts), gradients = differentiate(batch["logits"], batch["values"], batch)
    weights = token_weights(batch["mask"])
    pieces = []
    for rows in (slice(*ends) for ends in cut):
        micro = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        pieces.append(differentiate(micro["logits"], micro["values"], micro, weights=weights[rows]))
    chex.assert_trees_all_close(sum(p[0][0] for p in pieces), total, rtol=1e-6)
    summed = jax.tree.map(lambda *xs: sum(xs), *(p[0][1] for p in pieces))
    chex.assert_trees_all_close(summed, parts, rtol=1e-6)
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(p[1] for p in pieces))
    chex.assert_trees_all_close(joined, gradients, rtol=1e-6, atol=1e-9)


def test_garbage_reaches_neither_value_nor_gradient():
    clean = random_batch(2)
    mask = clean["mask"]

    def value_and_gradients(fill):
        names = ("old_logprobs", "advantages", "values", "old_values", "returns")
        batch = clean | {name: np.where(mask, clean[name], fill) for name in names}
        batch["new_logprobs"] = np.where(mask, clean["old_logprobs"] + 0.1, -fill)

        def loss(floats):
            policy, _ = clipped_policy_loss(
                floats["new_logprobs"], floats["old_logprobs"], floats["advantages"], mask
            )
            return policy + value_loss(
                floats["values"],
                floats["returns"],
                mask,
                old_values=floats["old_values"],
                clip_range=0.2,
            )

        return jax.value_and_grad(loss)({k: batch[k] for k in (*names, "new_logprobs")})

    result = value_and_gradients(np.resize([np.nan, np.inf, -np.inf, 1e30, 0.0], mask.shape))
    chex.assert_tree_all_finite(result)
    chex.assert_trees_all_equal(result, value_and_gradients(0.0))


def test_half_precision_inputs_become_float32():
    batch = random_batch(0)
    half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in batch.items() if k != "mask"}
    whole = {k: v.astype(jnp.float32) for k, v in half.items()}
    results = [
        (
            clipped_policy_loss(b["values"], b["old_values"], b["advantages"], batch["mask"]),
            value_loss(b["values"], b["returns"], batch["mask"]),
        )
        for b in (half, whole)
    ]
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal(*results)


def test_coefficients_can_be_traced_without_recompiling():
    batch = random_batch(0)
    traced_once = jax.jit(chex.assert_max_traces(clipped_policy_loss, 1))
    for clip_range, count in ((0.2, 7), (0.1, 20)):
        traced_once(
            batch["values"],
            batch["old_values"],
            batch["advantages"],
            batch["mask"],
            clip_range=clip_range,
            weights=np.full(SHAPE, 1 / count, np.float32),
        )


def test_vmap_over_clip_ranges():
    batch = random_batch(0)
    args = batch["values"], batch["old_values"], batch["advantages"], batch["mask"]
    stacked = jax.vmap(lambda c: clipped_policy_loss(*args, clip_range=c))(jnp.array([0.1, 0.4]))
    for i, clip_range in enumerate((0.1, 0.4)):
        alone = clipped_policy_loss(*args, clip_range=clip_range)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], stacked), alone, rtol=1e-6)


@pytest.mark.parametrize("given", [{"old_values": np.zeros(3)}, {"clip_range": 0.2}])
def test_half_a_value_clipping_is_refused(given):
    with pytest.raises(ValueError, match="both old_values and clip_range"):
        value_loss(np.zeros(3), np.zeros(3), np.ones(3, bool), **given)


def test_a_wrong_shape_is_refused():
    x = np.zeros(SHAPE, np.float32)
    with pytest.raises(AssertionError, match="shape"):
        inspect.unwrap(clipped_policy_loss)(x, x, x[0], x)
    with pytest.raises(AssertionError, match="shape"):
        inspect.unwrap(value_loss)(x, x[:, :1], x)
