"""What scored episodes come to: means, spreads, lengths, and how much their texts repeat."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_jax.generation.actor import Experience
from qwen_env.prompts import Prompt
from qwen_env.task import Episode, Outcome


def evaluation_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means over episodes: score, the reward's components, response length, and as `eos_rate` the
    share that ended by themselves: by an end-of-sequence id or a stop string, not by the limit."""
    return {
        "score": float(np.mean([outcome.reward for outcome in outcomes])),
        **component_means(outcomes),
        "length_mean": float(np.mean([o.info["completion_length"] for o in outcomes])),
        "eos_rate": float(np.mean([o.info["finish_reason"] != "length" for o in outcomes])),
    }


def component_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means of the components that the reward function named, each over the episodes that have it.

    One call of the reward function gives every episode the same components, another call may give
    others. The score itself is left out.
    """
    rows = [outcome.info["reward_components"] for outcome in outcomes]
    names = dict.fromkeys(name for row in rows for name in row if name != "score")
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def length_counts(experience: Experience, limit: int) -> np.ndarray:
    """int [T]: how many responses have 1, 2, ..., T = `limit` tokens."""
    lengths = [len(episode.completion_ids) for episode in experience.episodes]
    return np.bincount(lengths, minlength=limit + 1)[1:]


def gold_spread(experience: Experience) -> dict[str, float]:
    """The standard deviation of the gold score in a batch, where there is a gold score."""
    components = [outcome.info["reward_components"] for outcome in experience.outcomes]
    if "gold" not in components[0]:
        return {}
    return {"reward/gold_std": float(np.std([row["gold"] for row in components]))}


def repetition(completions: Sequence[np.ndarray]) -> dict[str, float]:
    """Diversity of a batch of completions, as token ids.

    Returns:
        text/distinct_1, text/distinct_2: different 1-grams and 2-grams in the whole batch, as a
            share of all of them (Li et al. 2016, arXiv:1510.03055). They fall as responses become
            alike, and with the batch's size: compare batches of one size.
        text/repeated_4: share of 4-grams that stood earlier in the same completion.
    """
    return {
        "text/distinct_1": _distinct(completions, 1),
        "text/distinct_2": _distinct(completions, 2),
        "text/repeated_4": _repeated(completions, 4),
    }


def _distinct(completions: Sequence[np.ndarray], n: int) -> float:
    grams = [gram for ids in completions for gram in _ngrams(ids, n)]
    return len(set(grams)) / max(len(grams), 1)


def _repeated(completions: Sequence[np.ndarray], n: int) -> float:
    each = [_ngrams(ids, n) for ids in completions]
    repeats = sum(len(grams) - len(set(grams)) for grams in each)
    return repeats / max(sum(map(len, each)), 1)


def _ngrams(ids: np.ndarray, n: int) -> list[tuple[int, ...]]:
    row = ids.tolist()
    return list(zip(*(row[i:] for i in range(n)), strict=False))


def sample_record(episode: Episode, outcome: Outcome) -> dict[str, Any]:
    """An episode as a line of `samples.jsonl`."""
    message = user_message(episode.prompt)
    return {
        "prompt": episode.prompt.text,
        **({} if message is None else {"user_message": message}),
        "completion": outcome.info["completion"],
        "finish_reason": episode.finish_reason,
        "score": outcome.reward,
        "components": outcome.info["reward_components"],
    }


def user_message(prompt: Prompt) -> str | None:
    """What the user says last in a chat; None where the prompt is no chat, or was cut."""
    text = prompt.row.get("prompt")
    messages = prompt.row.get("messages") or [{"role": "user", "content": text}]
    said = [message.get("content") for message in messages if message.get("role") == "user"]
    if not said or not isinstance(said[-1], str) or said[-1] == prompt.text:
        return None
    return said[-1] if said[-1].strip() in prompt.text else None
