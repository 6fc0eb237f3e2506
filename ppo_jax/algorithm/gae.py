"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438)."""

import chex
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Real, Shaped

from ppo_jax.algorithm.masking import AnyArray, Scalar, zero_invalid


def generalized_advantage_estimation(
    rewards: Real[AnyArray, "B T"],
    values: Real[AnyArray, "B T"],
    terminated: Shaped[AnyArray, "B T"],
    last_value: Real[AnyArray, "B"],
    *,
    mask: Shaped[AnyArray, "B T"] | None = None,
    gamma: Scalar = 0.99,
    gae_lambda: Scalar | Real[AnyArray, "B"] = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and returns, by the backward recursion over t = T-1, ..., 0

        δₜ = rₜ + γ (1 - dₜ) Vₜ₊₁ - Vₜ
        Aₜ = δₜ + γλ (1 - dₜ) Aₜ₊₁            A_T = 0
        Gₜ = Aₜ + Vₜ                          V_T = last_value

    Invalid steps are skipped, as if the row had been written without them: they get 0, and the
    t+1 of a valid step is the next valid step. So `last_value` stands after the last valid step,
    be it at T-1 or followed by padding.

    Args:
        rewards: rₜ, the reward that action t brought.
        values: Vₜ, the value of the state in which action t was chosen.
        terminated: dₜ, True where action t ended the episode for good, so nothing is worth
            anything after it. A time limit is no such end: there `terminated` stays False.
        last_value: V_T, the value of the state after the last valid action: of a truncated
            episode, what it would still have been worth. Ignored, even if it is not finite, where
            that action terminated the episode.
        mask: True where a step is real; None means everywhere.
        gamma: discount γ in [0, 1].
        gae_lambda: λ in [0, 1], one for all or one a row; 0 trusts the values (Aₜ = δₜ), 1 the
            rewards.

    Returns:
        advantages A and returns G, float32 [B, T].
    """
    chex.assert_rank([rewards, values, terminated, last_value], [2, 2, 2, 1])
    if mask is None:
        mask = jnp.ones(rewards.shape, bool)
    chex.assert_equal_shape([rewards, values, terminated, mask])
    chex.assert_equal_shape_prefix([rewards, last_value], 1)

    def backward(
        carry: tuple[Array, Array], step: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        next_advantage, next_value = carry
        reward, value, ends, is_valid = step
        delta = reward + jnp.where(ends, 0.0, gamma * next_value) - value
        advantage = delta + jnp.where(ends, 0.0, gamma * gae_lambda * next_advantage)
        carry = (
            jnp.where(is_valid, advantage, next_advantage),
            jnp.where(is_valid, value, next_value),
        )
        return carry, advantage

    values = zero_invalid(values, mask)
    steps = (
        zero_invalid(rewards, mask),
        values,
        jnp.asarray(terminated, bool),
        jnp.asarray(mask, bool),
    )
    last_value = jnp.asarray(last_value, jnp.float32)
    _, advantages = lax.scan(
        backward,
        (jnp.zeros_like(last_value), last_value),
        tuple(jnp.swapaxes(x, 0, 1) for x in steps),
        reverse=True,
    )
    advantages = zero_invalid(jnp.swapaxes(advantages, 0, 1), mask)
    return advantages, advantages + values


def length_adaptive_lambda(length: Real[AnyArray, "B"], alpha: Scalar) -> Float[Array, "B"]:
    """λ = 1 - 1 / (α l) for a response of l tokens, and 0 where that is below 0: the weights of
    all temporal differences add up to α l (VAPO, Yue et al. 2025, arXiv:2504.05118)."""
    return jnp.maximum(1 - 1 / (alpha * jnp.maximum(jnp.asarray(length, jnp.float32), 1)), 0.0)
