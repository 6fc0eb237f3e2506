"""The PPO objective (Schulman et al. 2017, arXiv:1707.06347), as losses to be minimised.

Every loss is a mean over valid tokens or, given `weights`, their weighted sum. Cut into
micro-batches, a minibatch has the same loss and gradient if each micro-batch gets its part of the
minibatch's weights (`masking.token_weights`) and the results are added.
"""

from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Real, Shaped

from ppo_jax.algorithm.masking import AnyArray, Scalar, masked_mean, zero_invalid

RatioLevel = Literal["token", "sequence"]
ClipSides = Literal["one", "both"]

MAX_LOG_RATIO = 20.0
"""A ratio's logarithm is clamped to ± this, as verl does: e²⁰ is 5 · 10⁸, e⁸⁹ no float32."""


class PolicyLoss(NamedTuple):
    """`clip_fraction`: of valid tokens, by weight, the share with a ratio out of the clip range.

    That is stable-baselines3's. What TRL and verl call so is `ClipShares.active`.
    """

    loss: Float[Array, ""]
    clip_fraction: Float[Array, ""]


class ClipShares(NamedTuple):
    """Shares of valid tokens, by weight, whose gradient is 0 because of ..."""

    active: Float[Array, ""]  # the clip, or the dual clip
    clamped: Float[Array, ""]  # a log-ratio beyond ± MAX_LOG_RATIO


def probability_ratio(
    new_logprobs: Real[AnyArray, "*shape"],
    old_logprobs: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    level: RatioLevel = "token",
) -> Float[Array, "*shape"]:
    """ρ = exp(new - old), clamped to exp(± MAX_LOG_RATIO); 1 where `mask` is False.

    At the level "sequence" it is GSPO's (Zheng et al. 2025, arXiv:2507.18071, GSPO-token): every
    token of a row has exp of the row's mean of new - old, and the gradient of its own ratio.
    """
    log_ratio = _log_ratio(new_logprobs, old_logprobs, mask, level)
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _log_ratio(
    new_logprobs: Real[AnyArray, "*shape"],
    old_logprobs: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    level: RatioLevel,
) -> Float[Array, "*shape"]:
    log_ratio = zero_invalid(new_logprobs, mask) - zero_invalid(old_logprobs, mask)
    if level == "token":
        return log_ratio
    count = jnp.asarray(mask, bool).sum(-1, keepdims=True)
    mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    return zero_invalid(log_ratio + lax.stop_gradient(mean - log_ratio), mask)


def clipped_policy_loss(
    new_logprobs: Real[AnyArray, "*shape"],
    old_logprobs: Real[AnyArray, "*shape"],
    advantages: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    *,
    clip_range: Scalar = 0.2,
    clip_range_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    clip_sides: ClipSides = "one",
    ratio_level: RatioLevel = "token",
    weights: Real[AnyArray, "*shape"] | None = None,
) -> PolicyLoss:
    """The clipped surrogate, with ρₜ = exp(new - old), ε = clip_range and ε⁺ = clip_range_high:

        L = -mean min(ρₜ Aₜ, clip(ρₜ, 1-ε, 1+ε⁺) Aₜ)

    Its gradient is 0 for a token that has already moved past the range the way its advantage
    points: ρₜ > 1+ε⁺ with Aₜ > 0, ρₜ < 1-ε with Aₜ < 0. An ε⁺ above ε lets unlikely tokens rise
    faster (arXiv:2503.14476, "clip-higher").

    Against a token that has become much likelier although its advantage is negative, nothing above
    bounds the loss. The dual clip (arXiv:1912.09729) does, by c = dual_clip: where Aₜ < 0, the
    surrogate is at least c Aₜ. ρₜ itself is clamped, see `probability_ratio`.

    With `clip_sides` "both", a token out of the range counts for nothing, wherever its advantage
    points: the double-sided mask of SAO (arXiv:2607.07508), for ratios to the probabilities that a
    token was drawn with.

    Args:
        new_logprobs: log-probabilities of the actions under the policy that is being trained.
        old_logprobs: the same under the policy that chose them; data, as are the advantages.
        advantages: Aₜ.
        mask: True where an action is real.
        clip_range: ε.
        clip_range_high: ε⁺; None makes it ε.
        dual_clip: c, above 1; None leaves the surrogate unbounded below.
        clip_sides: "one", as above, or "both".
        ratio_level: see `probability_ratio`.
        weights: see the top of this file.
    """
    chex.assert_equal_shape([new_logprobs, old_logprobs, advantages, mask])
    low, high = clip_limits(clip_range, clip_range_high)
    ratio = probability_ratio(new_logprobs, old_logprobs, mask, ratio_level)
    advantages = zero_invalid(advantages, mask)
    surrogate = _surrogate(ratio, advantages, low, high, dual_clip, clip_sides)
    return PolicyLoss(
        loss=-masked_mean(surrogate, mask, weights=weights),
        clip_fraction=masked_mean((ratio < low) | (ratio > high), mask, weights=weights),
    )


def clip_shares(
    new_logprobs: Real[AnyArray, "*shape"],
    old_logprobs: Real[AnyArray, "*shape"],
    advantages: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    *,
    clip_range: Scalar = 0.2,
    clip_range_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    clip_sides: ClipSides = "one",
    ratio_level: RatioLevel = "token",
    weights: Real[AnyArray, "*shape"] | None = None,
) -> ClipShares:
    """Where `clipped_policy_loss`, given the same, has no gradient."""
    low, high = clip_limits(clip_range, clip_range_high)
    ratio = probability_ratio(new_logprobs, old_logprobs, mask, ratio_level)
    advantages = zero_invalid(advantages, mask)
    surrogate = _surrogate(ratio, advantages, low, high, dual_clip, clip_sides)
    log_ratio = _log_ratio(new_logprobs, old_logprobs, mask, ratio_level)
    return ClipShares(
        active=masked_mean(surrogate != ratio * advantages, mask, weights=weights),
        clamped=masked_mean(jnp.abs(log_ratio) > MAX_LOG_RATIO, mask, weights=weights),
    )


def clip_limits(clip_range: Scalar, clip_range_high: Scalar | None) -> tuple[Scalar, Scalar]:
    """The clip range of the ratio: 1 - ε and 1 + ε⁺, where None for ε⁺ makes it ε."""
    return 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)


def _surrogate(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    low: Scalar,
    high: Scalar,
    dual_clip: Scalar | None,
    sides: ClipSides,
) -> Float[Array, "*shape"]:
    """min(ρ A, clip(ρ) A), and at least c A where A is negative; or ρ A in the range alone."""
    if sides == "both":
        return jnp.where((ratio < low) | (ratio > high), 0.0, ratio * advantages)
    unclipped, clipped = ratio * advantages, jnp.clip(ratio, low, high) * advantages
    # Not jnp.minimum: where the two are equal, the gradient is the first one's, not a mixture.
    surrogate = jnp.where(unclipped <= clipped, unclipped, clipped)
    if dual_clip is None:
        return surrogate
    least = dual_clip * advantages
    return jnp.where((advantages < 0) & (surrogate < least), least, surrogate)


def value_loss(
    values: Real[AnyArray, "*shape"],
    returns: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    *,
    old_values: Real[AnyArray, "*shape"] | None = None,
    clip_range: Scalar | None = None,
    weights: Real[AnyArray, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Mean of (Vₜ - Gₜ)², without the factor 1/2 of TRL, verl and OpenRLHF: a `value_coef` of 0.1
    here is one of 0.2 there. `total_loss` applies it.

    With `old_values` and `clip_range` (both or neither), clipped as PPO's first implementation was:

        mean max((Vₜ - Gₜ)², (clip(Vₜ, Vₜᵒˡᵈ - ε, Vₜᵒˡᵈ + ε) - Gₜ)²)

    Args:
        values: Vₜ, the value head's present output.
        returns: Gₜ, data.
        mask: True where a step is real.
        old_values: the values that `returns` were made with; data.
        clip_range: ε, in units of value.
        weights: see the top of this file.

    Raises:
        ValueError: only one of `old_values` and `clip_range` is given.
    """
    chex.assert_equal_shape([values, returns, mask])
    values, returns = zero_invalid(values, mask), zero_invalid(returns, mask)
    error = jnp.square(values - returns)
    if (old_values is None) != (clip_range is None):
        raise ValueError("Value clipping needs both old_values and clip_range; give both or none.")
    if old_values is not None and clip_range is not None:
        old_values = zero_invalid(old_values, mask)
        clipped_values = jnp.clip(values, old_values - clip_range, old_values + clip_range)
        error = jnp.maximum(error, jnp.square(clipped_values - returns))
    return masked_mean(error, mask, weights=weights)


def total_loss(
    policy_loss: Scalar,
    value_loss: Scalar,
    entropy: Scalar,
    *,
    value_coef: Scalar,
    entropy_coef: Scalar,
) -> Float[Array, ""]:
    """policy_loss + value_coef · value_loss - entropy_coef · entropy.

    `entropy` is the mean entropy of the policy at the valid tokens, in nats: it is rewarded.
    `value_loss` has no factor 1/2, so `value_coef` is half of what it is elsewhere.
    """
    return jnp.asarray(policy_loss + value_coef * value_loss - entropy_coef * entropy)
