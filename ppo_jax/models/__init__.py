"""Qwen2 in Flax NNX: backbone, policy with value head, reward model, and their files."""

from ppo_jax.models.config import Qwen2Config
from ppo_jax.models.heads import PolicyValueNetwork, RewardModel, with_separate_critic
from ppo_jax.models.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)

__all__ = [
    "PolicyValueNetwork",
    "Qwen2Config",
    "RewardModel",
    "load_pretrained",
    "load_reward_model",
    "save_pretrained",
    "save_reward_model",
    "with_separate_critic",
]
