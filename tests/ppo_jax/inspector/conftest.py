"""Inspections of any size, made up."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ppo_jax.inspector.page import Inspection, RunRecords

WORDS = (" the", " film", " was", " not", ",", " loved", "\n", "", " 世", " <b>", "é", "</script>")


def made_up_episode(num_tokens: int, score: float, seed: int) -> dict[str, Any]:
    random_numbers = random.Random(seed)

    def normal(mean: float, deviation: float) -> list[float]:
        return [float(f"{random_numbers.gauss(mean, deviation):.4g}") for _ in range(num_tokens)]

    text = [random_numbers.choice(WORDS) for _ in range(num_tokens - 1)] + ["<|im_end|>"]
    logprob = [-abs(x) for x in normal(0, 1)]
    return {
        "prompt": ["<|im_start|>", "user", "\n", "Write", " a", " review", "<|im_end|>"],
        "prompt_ids": [1, 2, 3, 4, 5, 6, 7],
        "text": text,
        "ids": [random_numbers.randrange(150_000) for _ in text],
        "logprob": logprob,
        "entropy": [abs(x) for x in normal(1, 0.6)],
        "kl": normal(0.1, 0.5),
        "ratio": [float(f"{math.exp(x):.4g}") for x in normal(0, 0.08)],
        "value": normal(score / 2, 0.1),
        "advantage": normal(0, 1),
        "reward": [0.0] * (num_tokens - 1) + [score],
        "alternatives": [
            [[word, x], [" some", -0.7], [" none", -1.4], [" \n", -2.0], [" ever", -3.0]]
            for word, x in zip(text, logprob, strict=True)
        ],
        "finish_reason": "eos",
        "score": score,
        "components": {"score": score, "gold": 2 * score},
    }


def made_up_run(name: str, slope: float) -> RunRecords:
    metrics = [
        {"iteration": i, "objective/score": slope * i, "policy/entropy": None} for i in range(1, 61)
    ]
    samples = [
        {
            "iteration": iteration,
            "prompt": prompt,
            "decoding": decoding,
            "score": slope,
            "completion": f" was {name} at {iteration}",
        }
        for iteration in (20, 60)
        for prompt in ("The plot", f"Only in {name}")
        for decoding in ("greedy", "sampled")
    ]
    return RunRecords(name, metrics, samples)


def made_up_inspection(num_episodes: int, num_tokens: int, **changes: Any) -> Inspection:
    """With more than one episode, they have 1, 2, ... tokens fewer, and other scores."""
    episodes = [
        made_up_episode(max(num_tokens - i, 1), float(i - 2), seed=i) for i in range(num_episodes)
    ]
    edges = {"ratio": np.linspace(0, 2, 41).tolist(), "advantage": np.linspace(-5, 5, 41).tolist()}
    arguments: dict[str, Any] = {
        "tokens": {
            "iteration": 40,
            "batch": {
                "score": [0.1 * i for i in range(64)],
                "length": list(range(1, 65)),
                "kl": [0.2 * i for i in range(64)],
            },
            "episodes": episodes,
        },
        "run": made_up_run("runs/mine", 0.1),
        "distributions": {
            "iteration": 40,
            "ratio": list(range(40)),
            "advantage": list(range(40)),
            "kl_by_position": [0.1, 0.2, None],
        },
        "edges": edges,
        "clip_limits": (0.8, 1.2),
        "other": made_up_run("runs/other", 0.2),
    }
    return Inspection(**(arguments | changes))


@pytest.fixture(scope="session")
def make_inspection() -> Callable[..., Inspection]:
    return made_up_inspection
