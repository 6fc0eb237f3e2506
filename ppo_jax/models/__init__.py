"""Qwen2 and its relatives in Flax NNX: backbone, policy with value head, reward model; files."""

from ppo_jax.models.config import Qwen2Config
from ppo_jax.models.heads import PolicyValueNetwork, RewardModel, with_separate_critic
from ppo_jax.models.loading import load_pretrained, load_reward_model
from ppo_jax.models.saving import Generation, save_pretrained, save_reward_model

__all__ = [
    "Generation",
    "PolicyValueNetwork",
    "Qwen2Config",
    "RewardModel",
    "load_pretrained",
    "load_reward_model",
    "save_pretrained",
    "save_reward_model",
    "with_separate_critic",
]
