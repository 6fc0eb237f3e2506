"""Text generation as a Gymnasium environment: importing this package registers `QwenText-v0`.

Rewards are in `qwen_env.rewards`, prompts in `qwen_env.prompts`, tokenizers in
`qwen_env.tokenizer`, and the MDP itself in `qwen_env.mdp`.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from gymnasium.envs.registration import register

if TYPE_CHECKING:
    __version__: str

__all__ = ["__version__"]

# No max_episode_steps: TimeLimit would cut an episode without telling the environment, and the
# score of the cut episode would be lost. `max_new_tokens` is the limit, inside the MDP.
register(
    id="QwenText-v0",
    entry_point="qwen_env.env:QwenTextEnv",
    vector_entry_point="qwen_env.vector_env:QwenTextVectorEnv",
)


def __getattr__(name: str) -> str:
    if name == "__version__":
        return version("qwen-ppo-jax")
    raise AttributeError(f"module 'qwen_env' has no attribute {name!r}")
