"""The loss of a minibatch, or of a part of one, and what to watch of it.

Shapes: M rows, T response limit.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppo_jax import algorithm
from ppo_jax.config import PPOConfig
from ppo_jax.learning.batch import Batch
from ppo_jax.learning.response_outputs import ResponseOutputs, ResponseValues


def averaged(config: PPOConfig) -> tuple[str, ...]:
    """The metrics of a minibatch, which are averaged over those of an iteration."""
    policy = ("loss", "clip_fraction", "clip_active_fraction", "clamped_fraction", "approx_kl")
    of_values = ("value/loss",) if config.has_value_function else ()
    return (*(f"policy/{name}" for name in policy), *of_values)


class MinibatchSums(NamedTuple):
    """Sums over tokens, by their weights: those of the parts add up to those of the minibatch."""

    loss: Float[Array, ""]
    metrics: dict[str, Array]  # see `averaged`
    stop_kl: Float[Array, ""]  # what the KL early stop looks at
    ratios: Int[Array, "bins"]  # a count, not weighted


def ppo_loss(
    new: ResponseOutputs, batch: Batch, weights: Float[Array, "M T"], config: PPOConfig
) -> tuple[Float[Array, ""], tuple[MinibatchSums, Float[Array, ""]]]:
    """The clipped objective, the value loss and the entropy bonus (`ppo_jax.algorithm.losses`).

    Args:
        new: of the policy that is being trained.
        batch: what it is to learn from.
        weights: what each token counts for; over the whole minibatch they add up to 1.

    Returns:
        the loss, and beside it the sums and the largest |ratio - 1|.
    """
    mask = batch.mask
    arguments = new.logprobs, batch.logprobs, batch.advantages, mask
    settings: dict[str, Any] = {
        "clip_range": config.clip_range,
        "clip_range_high": config.clip_range_high,
        "dual_clip": config.dual_clip,
        "clip_sides": config.clip_sides,
        "ratio_level": config.ratio_level,
        "weights": weights,
    }
    policy = algorithm.clipped_policy_loss(*arguments, **settings)
    shares = algorithm.clip_shares(*arguments, **settings)
    metrics = {
        "policy/loss": policy.loss,
        "policy/clip_fraction": policy.clip_fraction,
        "policy/clip_active_fraction": shares.active,
        "policy/clamped_fraction": shares.clamped,
    }
    if new.values is not None:
        metrics["value/loss"] = values_loss(new, batch, weights, config)
    loss = algorithm.total_loss(
        policy.loss,
        metrics.get("value/loss", 0.0),
        algorithm.masked_mean(new.entropy, mask, weights=weights),
        value_coef=config.value_coef,
        entropy_coef=config.entropy_coef,
    )

    def kl(estimator: algorithm.KlEstimator) -> Array:
        return algorithm.approx_kl(batch.logprobs, new.logprobs, mask, estimator, weights=weights)

    metrics["policy/approx_kl"] = kl("k3")
    ratio = algorithm.probability_ratio(new.logprobs, batch.logprobs, mask)
    sums = MinibatchSums(
        loss=loss,
        metrics=metrics,
        stop_kl=kl(config.target_kl_estimator),
        ratios=algorithm.masked_histogram(ratio, mask, algorithm.RATIO_EDGES),
    )
    return loss, (sums, jnp.abs(ratio - 1).max())


def values_loss(
    new: ResponseOutputs | ResponseValues,
    batch: Batch,
    weights: Float[Array, "M T"],
    config: PPOConfig,
) -> Float[Array, ""]:
    """The value loss alone, without its coefficient; see `ppo_loss`."""
    assert new.values is not None and batch.returns is not None
    if config.bins is not None:
        assert new.value_logits is not None
        return algorithm.hl_gauss_loss(
            new.value_logits, batch.returns, batch.mask, config.bins, weights=weights
        )
    return algorithm.value_loss(
        new.values,
        batch.returns,
        batch.mask,
        old_values=None if config.value_clip_range is None else batch.values,
        clip_range=config.value_clip_range,
        weights=weights,
    )
