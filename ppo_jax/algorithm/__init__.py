"""The maths of PPO for language models: pure functions of arrays, one idea a file.

All are float32, take a `mask` that is True where a token is real, and ignore what stands
elsewhere. All can be jitted, differentiated and vmapped.
"""

from ppo_jax.algorithm.gae import generalized_advantage_estimation
from ppo_jax.algorithm.kl import KlEstimator, approx_kl, kl_estimate
from ppo_jax.algorithm.losses import PolicyLoss, clipped_policy_loss, total_loss, value_loss
from ppo_jax.algorithm.masking import masked_mean, masked_var, masked_whiten
from ppo_jax.algorithm.rewards import token_rewards

__all__ = [
    "KlEstimator",
    "PolicyLoss",
    "approx_kl",
    "clipped_policy_loss",
    "generalized_advantage_estimation",
    "kl_estimate",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "token_rewards",
    "total_loss",
    "value_loss",
]
