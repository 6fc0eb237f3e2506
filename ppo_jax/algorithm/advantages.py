"""Advantages without a value function: a prompt's other completions, or the batch, as the baseline.

Each function gives what an episode's action tokens share; a return is the sum of an episode's token
rewards, KL penalties included.
"""

from typing import Literal

import chex
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Real

from ppo_jax.algorithm.masking import AnyArray

AdvantageEstimator = Literal["gae", "group", "leave_one_out", "reinforce_plus_plus"]

_GROUP_EPSILON = 1e-6


def group_advantages(returns: Real[AnyArray, "B"], group_size: int) -> Float[Array, "B"]:
    """GRPO's (Shao et al. 2024, arXiv:2402.03300), (R - mean) / (std + 1e-6), both over the
    completions of the prompt; std divides by n - 1, as in TRL and verl.

    Args:
        returns: R of each episode; the completions of a prompt follow each other.
        group_size: n, the completions of each prompt, at least 2.
    """
    centred = _centred_groups(returns, group_size)
    std = jnp.sqrt(jnp.square(centred).sum(axis=1, keepdims=True) / (group_size - 1))
    return (centred / (std + _GROUP_EPSILON)).ravel()


def leave_one_out_advantages(returns: Real[AnyArray, "B"], group_size: int) -> Float[Array, "B"]:
    """RLOO's (Ahmadian et al. 2024, arXiv:2402.14740): R less the mean of the prompt's others.

    That is n / (n - 1) times R less the mean of all n, which Dr. GRPO takes (arXiv:2503.20783).

    Args:
        returns: R of each episode; the completions of a prompt follow each other.
        group_size: n, the completions of each prompt, at least 2.
    """
    centred = _centred_groups(returns, group_size)
    return (centred * (group_size / (group_size - 1))).ravel()


def is_in_equal_group(scores: Real[AnyArray, "B"], group_size: int) -> Bool[Array, "B"]:
    """True for the completions of a prompt that all earned the same, so that none is better."""
    groups = _groups(scores, group_size)
    is_equal = (groups == groups[:, :1]).all(axis=1)
    return jnp.repeat(is_equal, group_size)


def _centred_groups(x: Real[AnyArray, "B"], group_size: int) -> Float[Array, "G n"]:
    """Each less its group's mean: from the first, so that what is equal is 0 without rounding."""
    groups = _groups(x, group_size)
    from_first = groups - groups[:, :1]
    return from_first - from_first.mean(axis=1, keepdims=True)


def _groups(x: Real[AnyArray, "B"], group_size: int) -> Float[Array, "G n"]:
    chex.assert_rank(x, 1)
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; a group has at least 2 completions.")
    return jnp.asarray(x, jnp.float32).reshape(-1, group_size)
