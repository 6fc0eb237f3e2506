"""PPO for Qwen2.5 and its relatives, in JAX and Flax.

    from ppo_jax import PPOAgent, preset

    agent = PPOAgent.from_config(preset("pocket"), prompts=["The plot"], reward=my_reward)
    for experience, metrics in agent.learn():
        print(metrics["iteration"], metrics["objective/score"])

The names in `__all__` are public, as are those of `ppo_jax.algorithm` (the mathematics) and
`ppo_jax.models` (networks and their files). Each is imported when it is first asked for, so that
importing this package takes no time and changes nothing in JAX.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_jax import algorithm as algorithm
    from ppo_jax import models as models
    from ppo_jax.agent import PPOAgent as PPOAgent
    from ppo_jax.config import OptimizerConfig as OptimizerConfig
    from ppo_jax.config import PPOConfig as PPOConfig
    from ppo_jax.config import RunConfig as RunConfig
    from ppo_jax.config import TaskConfig as TaskConfig
    from ppo_jax.config import TrainConfig as TrainConfig
    from ppo_jax.config import preset as preset
    from ppo_jax.generation.actor import Experience as Experience
    from ppo_jax.models import PolicyValueNetwork as PolicyValueNetwork
    from ppo_jax.models import RewardModel as RewardModel
    from ppo_jax.models import load_pretrained as load_pretrained
    from ppo_jax.models import load_reward_model as load_reward_model
    from ppo_jax.models import save_pretrained as save_pretrained
    from ppo_jax.models import save_reward_model as save_reward_model

    __version__: str

_HOMES = {
    "Experience": "ppo_jax.generation.actor",
    "OptimizerConfig": "ppo_jax.config",
    "PPOAgent": "ppo_jax.agent",
    "PPOConfig": "ppo_jax.config",
    "PolicyValueNetwork": "ppo_jax.models",
    "RewardModel": "ppo_jax.models",
    "RunConfig": "ppo_jax.config",
    "TaskConfig": "ppo_jax.config",
    "TrainConfig": "ppo_jax.config",
    "load_pretrained": "ppo_jax.models",
    "load_reward_model": "ppo_jax.models",
    "preset": "ppo_jax.config",
    "save_pretrained": "ppo_jax.models",
    "save_reward_model": "ppo_jax.models",
}

__all__ = [
    "Experience",
    "OptimizerConfig",
    "PPOAgent",
    "PPOConfig",
    "PolicyValueNetwork",
    "RewardModel",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "__version__",
    "algorithm",
    "load_pretrained",
    "load_reward_model",
    "models",
    "preset",
    "save_pretrained",
    "save_reward_model",
]


def __getattr__(name: str) -> Any:
    """A public name, from its home."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("algorithm", "models"):
        return import_module(f"ppo_jax.{name}")
    if name == "__version__":
        return version("qwen-ppo-jax")
    raise AttributeError(f"module 'ppo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
