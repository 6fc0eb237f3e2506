"""Good and bad symbols, and a reward at the end for answers in which the good ones prevail.

Eighteen of 36 symbols are good, and the others are bad, which the model, a random one, does not
know. An answer is 64 symbols long, and earns 1 if at least 42 of them are good, or else 0. Of
answers that are drawn by chance that is one in a hundred, and its reward does not say which of its
symbols helped. A value function can see what there is so far.
"""

import string
from collections.abc import Sequence

import numpy as np

from learning.long_answers_settings import ENOUGH, LENGTH, Setting
from learning.tiny import make_tokenizer
from learning.trainer import Bench
from qwen_env.episodes import Episode, Outcome
from qwen_env.prompts import load_prompts
from qwen_env.rewards import RewardBatch
from qwen_env.task import make_task

SYMBOLS = string.digits + string.ascii_lowercase
GOOD = frozenset(SYMBOLS[::2])


def enough_are_good(batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """1 where there are enough, or else 0; and their share."""
    counts = np.array([sum(symbol in GOOD for symbol in text) for text in batch.completions])
    enough = (counts >= ENOUGH).astype(np.float32)
    return enough, {"accuracy": enough, "good": (counts / LENGTH).astype(np.float32)}


def make_bench(setting: Setting) -> Bench:
    """The same for all settings."""
    prompts = [{"prompt": symbol} for symbol in SYMBOLS]
    task = make_task(
        tokenizer=make_tokenizer((), SYMBOLS),
        prompts=prompts,
        reward=enough_are_good,
        max_prompt_length=1,
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        chat_template=False,
    )
    again = list(load_prompts(prompts, task.prompt_encoder, "the prompts")) * 16
    return Bench(task, again, 48, [])


def means(episodes: Sequence[Episode], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Over a batch of episodes."""
    parts = [outcome.info["reward_components"] for outcome in outcomes]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]} | {
        "length": float(np.mean([len(episode.completion_ids) for episode in episodes]))
    }
