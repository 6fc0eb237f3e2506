"""Settings of a run: what they are, which values they may have, and presets of them."""

from ppo_jax.config.optimizer import AdamWConfig, OptimizerConfig
from ppo_jax.config.ppo import PPOConfig, SamplingConfig
from ppo_jax.config.presets import PRESETS, preset
from ppo_jax.config.session import (
    DevicesConfig,
    ProcessesConfig,
    RunConfig,
    SessionConfig,
    TrackerName,
)
from ppo_jax.config.settings import RunSettings, TrainConfig, as_json, from_json
from ppo_jax.config.supervised import (
    CompletionsConfig,
    ExamplesConfig,
    LearningConfig,
    PreferenceLossConfig,
    PreferencesConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
    SupervisedRunConfig,
    total_iterations,
)
from ppo_jax.config.task import ModelConfig, ResponseConfig, TaskConfig

__all__ = [
    "PRESETS",
    "AdamWConfig",
    "CompletionsConfig",
    "DevicesConfig",
    "ExamplesConfig",
    "LearningConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PreferenceLossConfig",
    "PreferencesConfig",
    "ProcessesConfig",
    "ResponseConfig",
    "RewardModelConfig",
    "RunConfig",
    "RunSettings",
    "SFTConfig",
    "SamplingConfig",
    "SessionConfig",
    "SupervisedConfig",
    "SupervisedRunConfig",
    "TaskConfig",
    "TrackerName",
    "TrainConfig",
    "as_json",
    "from_json",
    "preset",
    "total_iterations",
]
