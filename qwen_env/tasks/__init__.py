"""Tasks by name: prompts, and the reward that verifies the answers to them.

gymnasium.make("QwenText-v0", tokenizer=..., task="gsm8k", chat_template=True)
ppo-train --task "reasoning_gym:chain_sum?min_terms=3&max_terms=4" --model ...
"""

from qwen_env.tasks.base import NamedTask
from qwen_env.tasks.loading import has_one_turn, load_named_task

__all__ = ["NamedTask", "has_one_turn", "load_named_task"]
