"""Qwen2, Qwen3 and Llama in Flax NNX: decoder, policy with value head, reward model; files."""

from ppo_jax.models.config import DecoderConfig, Llama3Scaling, YarnScaling
from ppo_jax.models.heads import (
    PolicyValueNetwork,
    RewardModel,
    ValueFunction,
    as_reward_model,
    with_separate_critic,
    with_value_bins,
)
from ppo_jax.models.loading import load_critic, load_pretrained, load_reward_model
from ppo_jax.models.saving import Generation, save_pretrained, save_reward_model

__all__ = [
    "DecoderConfig",
    "Generation",
    "Llama3Scaling",
    "PolicyValueNetwork",
    "RewardModel",
    "ValueFunction",
    "YarnScaling",
    "as_reward_model",
    "load_critic",
    "load_pretrained",
    "load_reward_model",
    "save_pretrained",
    "save_reward_model",
    "with_separate_critic",
    "with_value_bins",
]
