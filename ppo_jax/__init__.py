"""PPO for Qwen2 language models, in JAX and Flax."""
