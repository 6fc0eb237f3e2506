"""From prompts to scored episodes: the compiled rollout, then the task's reward function."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ppo_jax.compilation import jit
from ppo_jax.generation.rollout import Rollout, rollout
from ppo_jax.hosts import fetch, own_part, together
from ppo_jax.mesh import gather, on_own_rows, replicate
from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.prompts import Prompt
from qwen_env.task import Episode, Outcome, TextTask, episodes_of


@dataclass(frozen=True)
class Experience:
    """B finished episodes and what they came to."""

    rollout: Rollout  # arrays on the device
    episodes: Sequence[Episode]
    outcomes: Sequence[Outcome]
    rollout_s: float  # wall time, seconds
    score_s: float

    @property
    def scores(self) -> np.ndarray:
        """float32 [B]."""
        return np.array([outcome.reward for outcome in self.outcomes], np.float32)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens of all rows."""
        return sum(len(e.prompt.ids) + len(e.completion_ids) for e in self.episodes)


class Actor:
    """Lets a network respond to prompts of a task. Compiles once for each batch size and
    number of completions.

    Args:
        network: fixes the architecture; its parameters are given at each call.
        task: prompts, rules and reward; its vocabulary is the network's.
        sampling: how tokens are drawn.
        compacts_rows: see `ppo_jax.generation.rollout.rollout`.
        mesh: that the prompts of a call are cut over; they must be a multiple of its devices.

    Raises:
        UsageError: the network does not fit the task.
    """

    def __init__(
        self,
        network: PolicyValueNetwork,
        task: TextTask,
        sampling: Sampling,
        *,
        compacts_rows: bool = False,
        mesh: Mesh | None = None,
    ):
        if task.rules.vocab_size != network.config.vocab_size:
            raise UsageError(
                f"The task has {task.rules.vocab_size} actions, but the model's vocabulary has "
                f"{network.config.vocab_size} ids; make the task with the model's vocab_size."
            )
        if task.rules.max_length > network.config.max_length:
            raise UsageError(
                f"max_prompt_length + max_new_tokens is {task.rules.max_length}, but the model "
                f"has {network.config.max_length} positions; lower one of them."
            )
        graphdef = nnx.graphdef(network)
        self.task = task
        self._mesh = mesh

        def compiled(
            params: nnx.State[Any, Any],
            ids: jax.Array,
            length: jax.Array,
            first_prompt: jax.Array,
            key: jax.Array,
            completions_per_prompt: int,
            greedy: bool,
        ) -> Rollout:
            def of_rows(whole: tuple[nnx.State[Any, Any], jax.Array], rows: Any) -> Rollout:
                params, key = whole
                ids, length, number = rows
                return rollout(
                    nnx.merge(graphdef, gather(params)),
                    ids,
                    length,
                    key,
                    rules=task.rules,
                    sampling=sampling,
                    prompt_number=number,
                    completions_per_prompt=completions_per_prompt,
                    greedy=greedy,
                    compacts_rows=compacts_rows,
                )

            number = first_prompt + jnp.arange(len(length))
            return on_own_rows(of_rows, mesh)((params, key), (ids, length, number))

        self._rollout = jit(compiled, static_argnames=("completions_per_prompt", "greedy"))

    def respond(
        self,
        params: nnx.State[Any, Any],
        prompts: Sequence[Prompt],
        key: jax.Array,
        *,
        first_prompt: int = 0,
        completions_per_prompt: int = 1,
        greedy: bool = False,
    ) -> Experience:
        """Respond to each prompt and score the responses in one call of the reward function.

        The completions of one prompt follow each other; it is read once for all of them.

        Args:
            first_prompt: the number of the first of the prompts, where they are a part of those
                that `key` is for: what a prompt is answered depends on its number.

        Raises:
            RewardError: the reward function raised, or its answer cannot be a reward.
        """
        start = time.perf_counter()
        first = self.task.initial_state(prompts)
        result = self._rollout(
            params,
            replicate(first.tokens[:, : self.task.rules.max_prompt_length], self._mesh),
            replicate(first.prompt_length, self._mesh),
            replicate(np.array(first_prompt, np.int32), self._mesh),
            key,
            completions_per_prompt=completions_per_prompt,
            greedy=greedy,
        )
        end: mdp.State = fetch(result.state)
        rolled_out = time.perf_counter()
        rows = [prompt for prompt in prompts for _ in range(completions_per_prompt)]
        episodes = episodes_of(rows, end)
        # Each process scores its part, and all know all scores.
        own = own_part(episodes)
        parts = together(lambda: [(x.reward, x.info) for x in self.task.evaluate(own)])
        outcomes = [Outcome(*outcome) for part in parts for outcome in part]
        scored = time.perf_counter()
        return Experience(result, episodes, outcomes, rolled_out - start, scored - rolled_out)

    def respond_to_all(
        self,
        params: nnx.State[Any, Any],
        prompts: Sequence[Prompt],
        key: jax.Array,
        *,
        batch_size: int,
        completions_per_prompt: int = 1,
        greedy: bool = False,
        on_batch: Callable[[int], object] = lambda done: None,
    ) -> tuple[list[Episode], list[Outcome]]:
        """Any number of prompts, about `batch_size` at a time; the last batch is filled up.

        The completions of one prompt follow each other. After each batch, `on_batch` is told how
        many prompts are done.

        Raises:
            RewardError: as in `respond`.
        """
        at_once = min(batch_size, max(len(prompts), 1))
        num_devices = 1 if self._mesh is None else self._mesh.size
        batch_size = -(-at_once // num_devices) * num_devices
        episodes: list[Episode] = []
        outcomes: list[Outcome] = []
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            filled = batch + batch[-1:] * (batch_size - len(batch))
            done = self.respond(
                params,
                filled,
                key,
                first_prompt=start,
                completions_per_prompt=completions_per_prompt,
                greedy=greedy,
            )
            episodes += done.episodes[: len(batch) * completions_per_prompt]
            outcomes += done.outcomes[: len(batch) * completions_per_prompt]
            on_batch(start + len(batch))
        return episodes, outcomes
