"""What an evaluation says of scored episodes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_env.task import Episode, Outcome


def evaluation_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means over episodes: score, the reward's components, response length, share ended by EOS."""
    return {
        "score": float(np.mean([outcome.reward for outcome in outcomes])),
        **component_means(outcomes),
        "length_mean": float(np.mean([o.info["completion_length"] for o in outcomes])),
        "eos_rate": float(np.mean([o.info["finish_reason"] == "eos" for o in outcomes])),
    }


def component_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means of the named components that the reward function reported; the plain score is none."""
    rows = [outcome.info["reward_components"] for outcome in outcomes]
    return {
        name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "score"
    }


def sample_record(episode: Episode, outcome: Outcome) -> dict[str, Any]:
    """An episode as a line of `samples.jsonl`."""
    return {
        "prompt": episode.prompt.text,
        "completion": outcome.info["completion"],
        "finish_reason": episode.finish_reason,
        "score": outcome.reward,
        "components": outcome.info["reward_components"],
    }
