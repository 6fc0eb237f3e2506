"""Counting on by sevens, from one of 36 symbols, paid for the last symbol alone.

    prompt  3
    answer  ahov29gnu18fmt07els6dkryz...

The model knows how it goes, for it has imitated a player who writes now and then any symbol, and
counts on from there. A mistake cannot be mended: what follows ends right by chance. So few answers
end right, and which of its tokens was wrong, an answer's reward does not say; a value function can
see it.
"""

import string
from collections.abc import Sequence

import numpy as np

from learning.long_answers_settings import LENGTH, MISTAKES, Setting
from learning.tiny import make_tokenizer
from learning.trainer import Bench, Lesson
from qwen_env.conversation import Conversation
from qwen_env.episodes import Episode, Outcome
from qwen_env.prompts import load_prompts
from qwen_env.rewards import RewardBatch
from qwen_env.task import make_task

SYMBOLS = string.digits + string.ascii_lowercase


def after(symbol: str, count: int = 1) -> str:
    """The symbol so many sevens later, which begins anew behind the last."""
    return SYMBOLS[(SYMBOLS.index(symbol) + 7 * count) % len(SYMBOLS)]


def player(conversation: Conversation, rng: np.random.Generator) -> str:
    """Counts on, but for a share of symbols that are any."""
    written = str(conversation.prompt.row["prompt"])
    for is_mistake in rng.random(LENGTH) < MISTAKES:
        written += SYMBOLS[rng.integers(len(SYMBOLS))] if is_mistake else after(written[-1])
    return written[1:]


def last_symbol(batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """1 where the last symbol is the right one, or else 0; and the share of right steps."""
    right, share = np.zeros(len(batch), np.float32), np.zeros(len(batch), np.float32)
    for i, (completion, row) in enumerate(zip(batch.completions, batch.rows, strict=True)):
        prompt = str(row["prompt"])
        right[i] = completion[LENGTH - 1 :] == after(prompt, LENGTH)
        pairs = zip(prompt + completion, completion, strict=False)
        share[i] = np.mean([after(one) == other for one, other in pairs] or 0.0)
    return right, {"accuracy": right, "right_steps": share}


def make_bench(setting: Setting) -> Bench:
    """The same for all settings."""
    prompts = [{"prompt": symbol} for symbol in SYMBOLS]
    task = make_task(
        tokenizer=make_tokenizer((), SYMBOLS),
        prompts=prompts,
        reward=last_symbol,
        max_prompt_length=1,
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        chat_template=False,
    )
    again = list(load_prompts(prompts, task.prompt_encoder, "the prompts")) * 16
    return Bench(task, again, 48, [Lesson(player, 2048, 4, 3e-3)])


def means(episodes: Sequence[Episode], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Over a batch of episodes."""
    parts = [outcome.info["reward_components"] for outcome in outcomes]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]} | {
        "length": float(np.mean([len(episode.completion_ids) for episode in episodes]))
    }
