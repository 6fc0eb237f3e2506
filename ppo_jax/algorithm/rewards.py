"""From one score an episode to one reward a token."""

from typing import Literal

import chex
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Real, Shaped

from ppo_jax.algorithm.kl import kl_estimate
from ppo_jax.algorithm.masking import AnyArray, Scalar, zero_invalid

KlLevel = Literal["token", "sequence"]


def token_rewards(
    score: Real[AnyArray, "B"],
    logprobs: Real[AnyArray, "B T"],
    ref_logprobs: Real[AnyArray, "B T"],
    mask: Shaped[AnyArray, "B T"],
    *,
    kl_coef: Scalar,
    estimator: Literal["k1", "k2", "k3"] = "k1",
    level: KlLevel = "token",
) -> Float[Array, "B T"]:
    """The score where the episode ends, less a penalty for leaving the reference model:

        rₜ = [t is the last valid step] · score - β klₜ        t = 0, ..., T-1

    where klₜ estimates KL(policy‖reference) from the token that was chosen at t, and β = kl_coef.
    Summed over an episode, k1 makes the penalty β (log π(response) - log π_ref(response)).

    At the level of the sequence, the last step pays for all. The gradient's mean is the same, since
    what earlier tokens paid is a baseline of the later ones. Its noise is not: the best policy,
    π_ref exp(score / β) / Z, makes score - Σ β klₜ = β log Z for all responses to a prompt.

    π is the policy that tokens are drawn from: tempered and, under top-k or top-p, normalised over
    the ids that those left. π_ref is tempered alike, but never truncated: what top-k and top-p take
    away is part of the distance from it.

    Args:
        score: the reward function's answer for each episode.
        logprobs: log-probabilities of the chosen tokens under the policy that chose them.
        ref_logprobs: the same under the reference model.
        mask: True where a token is real. A row without any has no rewards.
        kl_coef: β, reward per nat.
        estimator: see `ppo_jax.algorithm.kl.kl_estimate`.
        level: whether each token pays its own penalty, or the last one that of all.

    Returns:
        float32 [B, T]; 0 where `mask` is False.
    """
    chex.assert_rank([score, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    chex.assert_equal_shape_prefix([logprobs, score], 1)
    mask = jnp.asarray(mask, bool)
    kl = kl_estimate(zero_invalid(logprobs, mask), zero_invalid(ref_logprobs, mask), estimator)
    seen = jnp.cumsum(mask, axis=1)
    is_last = mask & (seen == seen[:, -1:])
    if level == "sequence":
        kl = jnp.where(is_last, zero_invalid(kl, mask).sum(-1, keepdims=True), 0.0)
    return zero_invalid(jnp.where(is_last, score[:, None], 0.0) - kl_coef * kl, mask)
