"""The asymmetric clip and the dual clip, against PyTorch's autograd and by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import clip_shares, clipped_policy_loss, probability_ratio, token_weights

SHAPE = (6, 8)
quick = settings(deadline=None, max_examples=40, derandomize=True)
compiled = jax.jit(clipped_policy_loss)


def random_batch(seed, spread=1.0):
    rng = np.random.default_rng(seed)
    old, advantages, moves = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    return old + spread * moves, old, advantages, rng.random(SHAPE) < 0.7


def torch_loss(new, old, advantages, mask, low, high, dual):
    """Sentence by sentence: the clip of arXiv:2503.14476, then the bound of arXiv:1912.09729."""
    old, advantages, mask = (torch.tensor(x) for x in (old, advantages, mask))
    ratio = (new - old).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        bounded = torch.maximum(surrogate, dual * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    clipped = (ratio < 1 - low) | (ratio > 1 + high)
    return -surrogate[mask].mean(), clipped[mask].float().mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, 0.28, None), (0.1, 0.5, 3.0), (0.3, 0.1, 1.5), (0.2, 0.2, 2.0)]
)
def test_loss_and_gradient_agree_with_pytorch(seed, low, high, dual):
    new, old, advantages, mask = random_batch(seed, spread=2.0)
    theirs = torch.tensor(new, requires_grad=True)
    expected, clip_fraction = torch_loss(theirs, old, advantages, mask, low, high, dual)
    expected.backward()

    def loss(new):
        return clipped_policy_loss(
            new,
            old,
            advantages,
            mask,
            clip_range=low,
            clip_range_high=high,
            dual_clip=dual,
        )

    result, gradient = loss(new), jax.grad(lambda x: loss(x).loss)(jnp.asarray(new))
    np.testing.assert_allclose(result.loss, expected.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.clip_fraction, clip_fraction.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-8)
    if dual is not None:
        bounded = mask & (advantages < 0) & (np.exp(new - old) > max(dual, 1 + high))
        assert bounded.any(), "the bound must act"
        assert (np.asarray(gradient)[bounded] == 0).all()


class GoldenTest(chex.TestCase):
    ratio = np.array([1.3, 1.5, 0.85, 0.5, 1.5, 4.0, 0.5], np.float32)
    advantages = np.array([2.0, 2.0, -2.0, 2.0, -2.0, -2.0, -2.0], np.float32)

    def losses(self, **options):
        """One loss a token."""
        function = self.variant(
            jax.vmap(
                lambda ratio, advantage: (
                    clipped_policy_loss(
                        jnp.log(ratio)[None], jnp.zeros(1), advantage[None], jnp.ones(1), **options
                    ).loss
                )
            )
        )
        return function(self.ratio, self.advantages)

    @chex.variants(with_jit=True, without_jit=True)
    def test_asymmetric_by_hand(self):
        # The range is 0.9 to 1.4: what is within it, and what has moved the wrong way, is whole.
        np.testing.assert_allclose(
            self.losses(clip_range=0.1, clip_range_high=0.4),
            -np.array([2.6, 2.8, -1.8, 1.0, -3.0, -8.0, -1.8]),
            rtol=1e-6,
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_dual_by_hand(self):
        # Alone the ratio of 4 with its negative advantage is bounded, by 3 · -2.
        np.testing.assert_allclose(
            self.losses(clip_range=0.1, clip_range_high=0.4, dual_clip=3.0),
            -np.array([2.6, 2.8, -1.8, 1.0, -3.0, -6.0, -1.8]),
            rtol=1e-6,
        )


@quick
@given(st.integers(0, 10_000), st.floats(0.05, 0.9), st.floats(1.01, 5))
def test_what_each_bound_can_do_to_the_loss(seed, clip_range, dual):
    """A wider range above never raises the loss of a token; nor does the dual clip."""
    batch = random_batch(seed, spread=2.0)
    plain = compiled(*batch, clip_range=clip_range).loss
    same = compiled(*batch, clip_range=clip_range, clip_range_high=clip_range).loss
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-6)
    assert compiled(*batch, clip_range=clip_range, clip_range_high=0.95).loss <= plain + 1e-5
    bounded = compiled(*batch, clip_range=clip_range, dual_clip=dual).loss
    assert bounded <= plain + 1e-5
    # Whatever the ratios, a token's loss now lies between -(1 + ε) |A| and c |A|.
    _, _, advantages, mask = batch
    least = (1 + clip_range) * np.where(advantages > 0, advantages, 0)
    most = dual * np.where(advantages < 0, -advantages, 0)
    assert -(least[mask].sum()) / max(mask.sum(), 1) - 1e-5 <= bounded
    assert bounded <= most[mask].sum() / max(mask.sum(), 1) + 1e-5


def test_clip_fraction_counts_either_side_of_its_own_range():
    ratio = np.array([0.85, 0.95, 1.3, 1.5], np.float32)
    zeros = np.zeros(4, np.float32)
    cases = (0.1, 0.4, 0.5), (0.2, 0.4, 0.25), (0.2, 0.2, 0.5), (0.1, 0.1, 0.75)
    for low, high, expected in cases:
        result = clipped_policy_loss(
            np.log(ratio), zeros, zeros, np.ones(4), clip_range=low, clip_range_high=high
        )
        assert result.clip_fraction == expected, (low, high)


@pytest.mark.parametrize("dual", [None, 2.0])
def test_the_clip_acts_where_the_gradient_vanishes(dual):
    """What TRL and verl call the clip fraction, `pg_losses2 > pg_losses`, and the dual clip."""
    new, old, advantages, mask = random_batch(5, spread=2.0)
    settings = {"clip_range": 0.3, "clip_range_high": 0.5, "dual_clip": dual}
    weights = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    gradient = jax.grad(lambda x: clipped_policy_loss(x, old, advantages, mask, **settings).loss)(
        new
    )
    vanishes = mask & (np.asarray(gradient) == 0)
    shares = clip_shares(new, old, advantages, mask, **settings)
    assert shares.active == pytest.approx(vanishes.sum() / mask.sum(), rel=1e-6)
    assert 0 < shares.active < compiled(new, old, advantages, mask, clip_range=0.3).clip_fraction
    weighted = clip_shares(new, old, advantages, mask, **settings, weights=weights)
    assert weighted.active == pytest.approx(weights[vanishes].sum(), rel=1e-5)
    ratio = torch.tensor(np.exp(new - old))
    losses = -torch.tensor(advantages) * ratio, -torch.tensor(advantages) * ratio.clamp(0.7, 1.5)
    if dual is None:
        theirs = (losses[1] > losses[0])[torch.tensor(mask)].double().mean()
        assert shares.active == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("far", [25.0, 99.0, -99.0, 1e30])
def test_a_ratio_beyond_all_reason_is_clamped(advantage, far):
    """To e^±20, as in verl; its token has no gradient, the other has its own."""
    new, old = np.array([far, 0.1], np.float32), np.zeros(2, np.float32)
    advantages, mask = np.float32([advantage, 1.0]), np.ones(2, bool)

    def loss(new):
        return clipped_policy_loss(new, old, advantages, mask).loss

    value, gradient = jax.value_and_grad(loss)(new)
    theirs = torch.tensor(new).clamp(-20, 20).exp()
    surrogate = torch.minimum(
        theirs * torch.tensor(advantages), theirs.clamp(0.8, 1.2) * torch.tensor(advantages)
    )
    assert value == pytest.approx(-surrogate.mean().item(), rel=1e-5)
    np.testing.assert_allclose(gradient, [0, -np.exp(0.1) / 2], rtol=1e-5)
    np.testing.assert_allclose(probability_ratio(new, old, mask), theirs, rtol=1e-5)
    assert clip_shares(new, old, advantages, mask).clamped == 0.5


def test_garbage_reaches_neither_value_nor_gradient():
    new, old, advantages, mask = random_batch(3)

    def value_and_gradient(fill):
        arrays = [jnp.where(mask, x, f) for x, f in ((new, -fill), (old, fill), (advantages, fill))]
        return jax.value_and_grad(
            lambda *x: clipped_policy_loss(*x, mask, clip_range_high=0.4, dual_clip=2.0).loss,
            argnums=(0, 1, 2),
        )(*arrays)

    result = value_and_gradient(np.resize([np.nan, np.inf, -np.inf, 1e30], SHAPE))
    chex.assert_tree_all_finite(result)
    chex.assert_trees_all_equal(result, value_and_gradient(np.zeros(SHAPE)))


@pytest.mark.parametrize("seed", range(3))
def test_a_ratio_of_the_whole_sequence_agrees_with_gspo(seed):
    """verl's `compute_policy_loss_gspo`: the mean log-ratio of a row, detached, and each token's
    own gradient; then the mean over rows of their means."""
    new, old, advantages, mask = random_batch(seed)
    mask[:, 0] = True
    theirs = torch.tensor(new, requires_grad=True)
    m = torch.tensor(mask)
    log_ratio = torch.where(m, theirs - torch.tensor(old), 0.0)
    of_rows = (log_ratio.sum(1) / m.sum(1)).detach()[:, None]
    ratio = (of_rows + theirs - theirs.detach()).exp()
    a = torch.tensor(advantages)
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - 0.1, 1 + 0.2) * a)
    expected = -(torch.where(m, surrogate, 0.0).sum(1) / m.sum(1)).mean()
    expected.backward()

    def loss(new):
        return clipped_policy_loss(
            new,
            old,
            advantages,
            mask,
            clip_range=0.1,
            clip_range_high=0.2,
            ratio_level="sequence",
            weights=token_weights(mask, "sequence"),
        ).loss

    np.testing.assert_allclose(loss(new), expected.item(), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(loss)(jnp.asarray(new))
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-7)


def test_both_sides_leave_out_what_is_out_of_range():
    """SAO's weights: the ratio inside of the range, 0 outside, whatever the advantage."""
    new, old, advantages, mask = random_batch(0, spread=2.0)
    settings = {"clip_range": 0.5, "clip_range_high": 1.0, "clip_sides": "both"}
    ratio = np.exp(new.astype(np.float64) - old)
    weight = np.where((ratio < 0.5) | (ratio > 2.0), 0, ratio) * mask
    value, gradient = jax.value_and_grad(
        lambda x: clipped_policy_loss(x, old, advantages, mask, **settings).loss
    )(jnp.asarray(new))
    np.testing.assert_allclose(value, -(weight * advantages)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, -weight * advantages / mask.sum(), rtol=1e-4, atol=1e-8)
    outside = ((weight == 0) & mask).sum() / mask.sum()
    shares = clip_shares(new, old, advantages, mask, **settings)
    np.testing.assert_allclose(shares.active, outside, rtol=1e-5)
