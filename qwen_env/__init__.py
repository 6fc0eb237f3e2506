"""Text generation as a Gymnasium environment: importing this package registers `QwenText-v0`."""

from gymnasium.envs.registration import register

# No max_episode_steps: TimeLimit would cut an episode without telling the environment, and the
# score of the cut episode would be lost. `max_new_tokens` is the limit, inside the MDP.
register(
    id="QwenText-v0",
    entry_point="qwen_env.env:QwenTextEnv",
    vector_entry_point="qwen_env.vector_env:QwenTextVectorEnv",
)
