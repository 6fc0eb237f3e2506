"""Settings of a run: what they are, which values they may have, and presets of them."""

from ppo_jax.config.presets import PRESETS, preset
from ppo_jax.config.settings import (
    DevicesConfig,
    OptimizerConfig,
    PPOConfig,
    ResponseConfig,
    RunConfig,
    SamplingConfig,
    TaskConfig,
    TrackerName,
    TrainConfig,
    as_json,
    from_json,
)

__all__ = [
    "PRESETS",
    "DevicesConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ResponseConfig",
    "RunConfig",
    "SamplingConfig",
    "TaskConfig",
    "TrackerName",
    "TrainConfig",
    "as_json",
    "from_json",
    "preset",
]
