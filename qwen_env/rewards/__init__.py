"""Reward functions: the protocol, the check of its answers, and how a string names one."""

from qwen_env.errors import RewardError
from qwen_env.rewards.base import RewardBatch, RewardFn, Scores, score
from qwen_env.rewards.loading import load_reward
from qwen_env.rewards.weighted_sum import WeightedSum

__all__ = [
    "RewardBatch",
    "RewardError",
    "RewardFn",
    "Scores",
    "WeightedSum",
    "load_reward",
    "score",
]
