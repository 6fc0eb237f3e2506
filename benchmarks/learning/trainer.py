"""Runs of PPO on tiny models that have imitated a player before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from learning.jobs import Record, Tick
from learning.tiny import Player, demonstrate, imitate, make_network
from ppo_jax.agent import PPOAgent
from ppo_jax.config import TrainConfig
from qwen_env.episodes import Episode, Outcome
from qwen_env.prompts import Prompt
from qwen_env.task import TextTask

WATCHED = "value/explained_variance", "policy/entropy", "time/iteration_s"
"""Metrics of PPO that each point of a curve has beside its measures."""


class Lesson(NamedTuple):
    """What is imitated before PPO begins."""

    player: Player
    num_episodes: int
    num_epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Bench:
    """What the seeds of a setting share."""

    task: TextTask
    held_out: list[Prompt]
    hidden_size: int
    lessons: Sequence[Lesson]


class Trainer:
    """Seeds of one setting that follow each other compile once.

    Args:
        make_bench: of a setting.
        config: how a setting learns, with a seed.
        means: the measures of a batch of episodes.
    """

    def __init__(
        self,
        make_bench: Callable[[Any], Bench],
        config: Callable[[Any, int], TrainConfig],
        means: Callable[[Sequence[Episode], Sequence[Outcome]], dict[str, float]],
    ):
        self._make_bench, self._config, self._means = make_bench, config, means
        self._last: tuple[Any, int, Bench, PPOAgent] | None = None

    def train(self, setting: Any, iterations: int, seed: int, tick: Tick) -> Record:
        """A run: its measures before each update, and at the end in episodes of their own."""
        bench, agent = self._fresh(setting, iterations, seed)
        curve = []
        for experience, metrics in agent.learn():
            point = self._means(experience.episodes, experience.outcomes)
            watched = {name: metrics[name] for name in WATCHED if name in metrics}
            curve.append(point | watched | {"iteration": agent.iteration - 1})
            tick()
        episodes, outcomes = agent.evaluate(bench.held_out, greedy=False)
        return {"curve": curve, "end": self._means(episodes, outcomes)}

    def _fresh(self, setting: Any, iterations: int, seed: int) -> tuple[Bench, PPOAgent]:
        is_new = self._last is None or self._last[:2] != (setting, iterations)
        bench = self._make_bench(setting) if is_new or self._last is None else self._last[2]
        network = make_network(bench.task, bench.hidden_size, seed)
        rng = np.random.default_rng(seed)
        for player, num_episodes, num_epochs, learning_rate in bench.lessons:
            chosen = rng.integers(0, len(bench.task.prompts), num_episodes)
            prompts = [bench.task.prompts[i] for i in chosen]
            episodes = demonstrate(bench.task, prompts, player, rng)
            imitate(
                network,
                episodes,
                bench.task,
                num_epochs=num_epochs,
                learning_rate=learning_rate,
                rng=rng,
            )
        config = self._config(setting, seed)
        agent = PPOAgent(network, bench.task, config, iterations)
        if not is_new and self._last is not None:  # what is compiled is the last one's
            state, agent = agent.state, self._last[3]
            agent.config, agent.state = config, state
        self._last = setting, iterations, bench, agent
        return bench, agent
