"""What scored episodes come to: means, spreads, lengths, and how much their texts repeat."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo_jax.generation.actor import Experience
from ppo_jax.generation.intervals import Interval, mean_interval, share_interval
from ppo_jax.generation.repeated_answers import majority, pass_at
from qwen_env.episodes import Episode, Outcome
from qwen_env.prompts import Prompt

ACCURACY = "accuracy"
"""The component of a reward that says whether an answer is right: 1, or else 0."""


def evaluation_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means over episodes: score, the reward's components, response length, and as `eos_rate` the
    share that ended by themselves: by an end-of-sequence id or a stop string, not by the limit."""
    return {name: float(np.mean(values)) for name, values in _by_name(outcomes).items()}


def evaluation_intervals(
    outcomes: Sequence[Outcome], samples: int = 1
) -> dict[str, Interval | None]:
    """95 % intervals of `evaluation_means`, over prompts; see `ppo_jax.generation.intervals`.

    Args:
        samples: responses to each prompt, which follow each other.

    Returns:
        the two ends, or None for a mean of one prompt that has no interval.
    """
    columns = _by_name(outcomes)
    means = {
        name: np.reshape(values, (-1, samples)).mean(axis=1) for name, values in columns.items()
    }
    # Of a stricter and a laxer grader, or of a term of a weighted sum: "flexible_accuracy".
    shares = {"eos_rate", *(name for name in columns if name.endswith(ACCURACY))}
    if columns["score"] == columns.get(ACCURACY):
        shares.add("score")
    return {
        name: share_interval(values, samples)
        if name in shares and _is_share(values)
        else mean_interval(values)
        for name, values in means.items()
    }


def repeated_answers(
    outcomes: Sequence[Outcome], samples: int, answer_of: Callable[[str], str | None] | None
) -> dict[str, np.ndarray]:
    """mean@k, pass@2, pass@4, ..., pass@k and maj@k of k = `samples` answers to each prompt.

    Args:
        outcomes: with an accuracy of 0 or 1 each; those of a prompt follow each other.
        answer_of: the answer that a completion gives, or None; without it there is no maj@k.

    Returns:
        float64 [N], a number in [0, 1] for each prompt, under each name.
    """
    right = np.array([o.info["reward_components"][ACCURACY] for o in outcomes])
    right = right.reshape(-1, samples).astype(int)
    counts = right.sum(axis=1)
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    shares = {
        f"mean@{samples}": counts / samples,
        **{f"pass@{k}": pass_at(k, counts, samples) for k in (*powers, samples)},
    }
    if answer_of is None:
        return shares
    answers = [answer_of(outcome.info["completion"]) for outcome in outcomes]
    rows = [answers[start : start + samples] for start in range(0, len(answers), samples)]
    return shares | {f"maj@{samples}": majority(rows, right)}


def is_right_or_wrong(outcomes: Sequence[Outcome]) -> bool:
    """Whether the reward says of every answer that it is right (accuracy 1), or not (0)."""
    return all(outcome.info["reward_components"].get(ACCURACY) in (0, 1) for outcome in outcomes)


def _by_name(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """A number of each episode, or of each that has it; see `evaluation_means`."""
    return {
        "score": [outcome.reward for outcome in outcomes],
        **_components(outcomes),
        "length_mean": [outcome.info["completion_length"] for outcome in outcomes],
        "eos_rate": [o.info["finish_reason"] not in ("length", "overflow") for o in outcomes],
    }


def _is_share(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def component_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means of the components that the reward function named, each over the episodes that have it.

    One call of the reward function gives every episode the same components, another call may give
    others. The score itself is left out.
    """
    return {name: float(np.mean(values)) for name, values in _components(outcomes).items()}


def _components(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    rows = [outcome.info["reward_components"] for outcome in outcomes]
    names = dict.fromkeys(name for row in rows for name in row if name != "score")
    return {name: [row[name] for row in rows if name in row] for name in names}


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
        **({} if outcome.messages is None else {"messages": outcome.messages}),
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
