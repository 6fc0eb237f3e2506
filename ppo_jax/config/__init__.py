"""Settings of a run: what they are, which values they may have, and presets of them."""

from ppo_jax.config.presets import PRESETS, preset
from ppo_jax.config.settings import (
    AdamWConfig,
    DevicesConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    ResponseConfig,
    RunConfig,
    RunSettings,
    SamplingConfig,
    SessionConfig,
    TaskConfig,
    TrackerName,
    TrainConfig,
    as_json,
    from_json,
)

__all__ = [
    "PRESETS",
    "AdamWConfig",
    "DevicesConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ResponseConfig",
    "RunConfig",
    "RunSettings",
    "SamplingConfig",
    "SessionConfig",
    "TaskConfig",
    "TrackerName",
    "TrainConfig",
    "as_json",
    "from_json",
    "preset",
]
