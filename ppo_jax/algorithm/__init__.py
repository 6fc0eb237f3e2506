"""The maths of PPO for language models: pure functions of arrays, one idea a file.

They compute in float32. A `mask` is True where a token is real; what stands elsewhere is ignored.
All can be jitted and vmapped and, but for counts, differentiated.
"""

from ppo_jax.algorithm.advantages import (
    AdvantageEstimator,
    group_advantages,
    is_in_equal_group,
    leave_one_out_advantages,
)
from ppo_jax.algorithm.gae import generalized_advantage_estimation, length_adaptive_lambda
from ppo_jax.algorithm.histogram import ADVANTAGE_EDGES, RATIO_EDGES, masked_histogram
from ppo_jax.algorithm.hl_gauss import Bins, expected_value, hl_gauss_loss, hl_gauss_targets
from ppo_jax.algorithm.kl import KlEstimator, adapted_kl_coef, approx_kl, is_clamped, kl_estimate
from ppo_jax.algorithm.losses import (
    ClipShares,
    ClipSides,
    PolicyLoss,
    RatioLevel,
    clip_limits,
    clip_shares,
    clipped_policy_loss,
    probability_ratio,
    total_loss,
    value_loss,
)
from ppo_jax.algorithm.masking import (
    Aggregation,
    masked_mean,
    masked_var,
    masked_whiten,
    token_weights,
)
from ppo_jax.algorithm.rewards import KlLevel, token_rewards
from ppo_jax.algorithm.running import RunningMoments, no_moments, updated_moments
from ppo_jax.algorithm.supervised import (
    bradley_terry_loss,
    calibration_error,
    centred_head,
    cross_entropy,
)

__all__ = [
    "ADVANTAGE_EDGES",
    "RATIO_EDGES",
    "AdvantageEstimator",
    "Aggregation",
    "Bins",
    "ClipShares",
    "ClipSides",
    "KlEstimator",
    "KlLevel",
    "PolicyLoss",
    "RatioLevel",
    "RunningMoments",
    "adapted_kl_coef",
    "approx_kl",
    "bradley_terry_loss",
    "calibration_error",
    "centred_head",
    "clip_limits",
    "clip_shares",
    "clipped_policy_loss",
    "cross_entropy",
    "expected_value",
    "generalized_advantage_estimation",
    "group_advantages",
    "hl_gauss_loss",
    "hl_gauss_targets",
    "is_clamped",
    "is_in_equal_group",
    "kl_estimate",
    "leave_one_out_advantages",
    "length_adaptive_lambda",
    "masked_histogram",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "no_moments",
    "probability_ratio",
    "token_rewards",
    "token_weights",
    "total_loss",
    "updated_moments",
    "value_loss",
]
