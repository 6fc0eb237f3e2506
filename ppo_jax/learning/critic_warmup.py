"""When the policy begins to learn: behind the critic's warm-up, which may end by itself."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppo_jax.config import OptimizerConfig
from ppo_jax.learning.metrics import Quotient


class CriticWarmup(NamedTuple):
    """Where a warm-up stands that ends once explained variance has stopped rising."""

    best: Float[Array, ""]  # explained variance so far
    num_since_best: Int[Array, ""]  # iterations
    policy_start: Int[Array, ""]  # the iteration in which the policy begins to learn, from 0


def begin_warmup(config: OptimizerConfig) -> CriticWarmup:
    """Before the first iteration: nothing was seen, and the policy waits as long as it may."""
    return CriticWarmup(
        jnp.float32(-jnp.inf),
        jnp.zeros((), jnp.int32),
        jnp.asarray(config.critic_warmup_iterations, jnp.int32),
    )


def go_on(
    warmup: CriticWarmup, iteration: Int[Array, ""], explained: Quotient, patience: int
) -> CriticWarmup:
    """After another rollout, the one of `iteration`, whose returns have been predicted.

    Once `patience` of them in a row have brought no new best, the policy begins with this one.

    Args:
        explained: the share of the returns' variance that the critic explains; a batch in which it
            is undefined brings no new best.
    """
    is_defined = explained.denominator > 0
    share = explained.numerator / jnp.where(is_defined, explained.denominator, 1.0)
    rises = is_defined & (share > warmup.best)
    since = jnp.where(rises, 0, warmup.num_since_best + 1)
    ends = (iteration < warmup.policy_start) & (since >= patience)
    return CriticWarmup(
        jnp.where(rises, share, warmup.best),
        since,
        jnp.where(ends, iteration, warmup.policy_start),
    )
