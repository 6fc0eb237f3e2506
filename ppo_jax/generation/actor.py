"""From prompts to scored episodes: the compiled rollout, then the task's reward function."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ppo_jax.compilation import jit
from ppo_jax.generation.rollout import Pause, Rollout, begin, resume, row_keys
from ppo_jax.generation.slots import Writing
from ppo_jax.hosts import fetch, own_part, together
from ppo_jax.mesh import gather, on_own_rows, replicate
from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.conversation import Answers, Conversation
from qwen_env.episodes import Episode, Outcome, episodes_of
from qwen_env.errors import UsageError
from qwen_env.prompts import Prompt
from qwen_env.task import TextTask


@dataclass(frozen=True)
class Experience:
    """B finished episodes and what they came to."""

    rollout: Rollout  # arrays on the device
    episodes: Sequence[Episode]
    outcomes: Sequence[Outcome]
    rollout_s: float  # wall time in seconds, the interaction's included
    score_s: float

    @property
    def scores(self) -> np.ndarray:
        """float32 [B]: what each episode earned in all."""
        return np.array([outcome.reward for outcome in self.outcomes], np.float32)

    @property
    def rewards(self) -> np.ndarray | None:
        """float32 [B, T]: what each token earned; None where only the last of each episode can earn
        anything, which is then the score."""
        pairs = list(zip(self.episodes, self.outcomes, strict=True))
        if all(e.conversation is None and o.token_rewards is None for e, o in pairs):
            return None
        rewards = np.zeros(self.rollout.logprobs.shape, np.float32)
        for row, (episode, outcome) in zip(rewards, pairs, strict=True):
            count = len(episode.response_ids)
            if outcome.token_rewards is None:
                row[count - 1] = outcome.last_reward
            else:
                row[:count][slice(None) if episode.own is None else episode.own] = (
                    outcome.token_rewards
                )
            for place, reward in outcome.turn_rewards:
                row[place] += reward
        return rewards

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens of all rows."""
        return sum(len(e.prompt.ids) + len(e.response_ids) for e in self.episodes)


class Actor:
    """Lets a network respond to prompts of a task. Compiles once for each batch size and
    number of completions.

    Args:
        network: fixes the architecture; its parameters are given at each call.
        task: prompts, rules and reward; its vocabulary is the network's.
        sampling: how tokens are drawn.
        compacts_rows: see `ppo_jax.generation.slots.Writing`.
        num_slots: rows that are written at a time on each device; None writes all of a call.
        mesh: that the prompts of a call are cut over; they must be a multiple of its devices.

    Raises:
        UsageError: the network or the number of slots does not fit the task.
    """

    def __init__(
        self,
        network: PolicyValueNetwork,
        task: TextTask,
        sampling: Sampling,
        *,
        compacts_rows: bool = False,
        num_slots: int | None = None,
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
        if num_slots is not None and task.rules.max_turns > 1:
            raise UsageError(
                f"rollout_slots is {num_slots}, but with max_turns {task.rules.max_turns} rows "
                "that wait for replies keep their slots; leave rollout_slots out."
            )
        graphdef = nnx.graphdef(network)
        self.task = task
        self._mesh = mesh

        def writing(greedy: bool, keeps_masks: bool = True) -> Writing:
            # A CPU would copy the part of a cache that it reads.
            bounds_reads = jax.default_backend() != "cpu"
            return Writing(
                task.rules, sampling, greedy, compacts_rows, num_slots, bounds_reads, keeps_masks
            )

        def begins(
            params: nnx.State[Any, Any],
            ids: jax.Array,
            length: jax.Array,
            first_prompt: jax.Array,
            key: jax.Array,
            completions_per_prompt: int,
            greedy: bool,
            keeps_masks: bool = True,
        ) -> Pause:
            def of_rows(whole: tuple[nnx.State[Any, Any], jax.Array], rows: Any) -> Pause:
                params, key = whole
                ids, length, number = rows
                keys = row_keys(key, number, completions_per_prompt)
                network = nnx.merge(graphdef, gather(params))
                return begin(network, ids, length, keys, writing(greedy, keeps_masks))

            number = first_prompt + jnp.arange(len(length))
            return on_own_rows(of_rows, mesh)((params, key), (ids, length, number))

        def resumes(
            params: nnx.State[Any, Any], pause: Pause, answers: Answers, greedy: bool
        ) -> Pause:
            def of_rows(params: nnx.State[Any, Any], rows: Any) -> Pause:
                pause, (ids, length, done) = rows
                network = nnx.merge(graphdef, gather(params))
                return resume(network, pause, ids, length, done, writing(greedy))

            return on_own_rows(of_rows, mesh)(params, (pause, answers))

        self._begin = jit(
            begins, static_argnames=("completions_per_prompt", "greedy", "keeps_masks")
        )
        self._resume = jit(resumes, static_argnames="greedy", donate_argnums=1)

    def respond(
        self,
        params: nnx.State[Any, Any],
        prompts: Sequence[Prompt],
        key: jax.Array,
        *,
        first_prompt: int = 0,
        completions_per_prompt: int = 1,
        greedy: bool = False,
        keeps_masks: bool = True,
    ) -> Experience:
        """Respond to each prompt and score the responses in one call of the reward function.

        The completions of one prompt follow each other.

        Args:
            first_prompt: the number of the first of the prompts, where they are a part of those
                that `key` is for: what a prompt is answered depends on its number.
            keeps_masks: under top-k or top-p, record what each token was drawn from, a bit for
                every id, which learning reads.

        Raises:
            RewardError: the reward function raised, or its answer cannot be a reward.
        """
        start = time.perf_counter()
        first = self.task.initial_state(prompts)
        pause = self._begin(
            params,
            replicate(first.tokens[:, : self.task.rules.max_prompt_length], self._mesh),
            replicate(first.prompt_length, self._mesh),
            replicate(np.array(first_prompt, np.int32), self._mesh),
            key,
            completions_per_prompt=completions_per_prompt,
            greedy=greedy,
            keeps_masks=keeps_masks,
        )
        rows = [prompt for prompt in prompts for _ in range(completions_per_prompt)]
        end: mdp.State = fetch(pause.rollout.state)
        conversations = None
        if self.task.partner is not None:
            seeds = self._seeds(key, first_prompt, len(prompts), completions_per_prompt)
            talks = [self.task.partner.start(*pair) for pair in zip(rows, seeds, strict=True)]
            pause, end, conversations = self._talk(params, pause, end, talks, greedy)
        result = pause.rollout
        del pause  # and with it the caches, before rewards are computed
        rolled_out = time.perf_counter()
        episodes = episodes_of(rows, end, conversations)
        # Each process scores its part, and all know all scores.
        own = own_part(episodes)
        parts = together(
            lambda: [
                (x.last_reward, x.info, x.turn_rewards, x.token_rewards, x.messages)
                for x in self.task.evaluate(own)
            ]
        )
        outcomes = [Outcome(*outcome) for part in parts for outcome in part]
        scored = time.perf_counter()
        return Experience(result, episodes, outcomes, rolled_out - start, scored - rolled_out)

    def _talk(
        self,
        params: nnx.State[Any, Any],
        pause: Pause,
        state: mdp.State,
        conversations: list[Conversation],
        greedy: bool,
    ) -> tuple[Pause, mdp.State, list[Conversation]]:
        """Turn by turn, until every episode has ended; `state` is that of `pause`, on the host.

        Each process asks about its part of the rows, and all know all replies; the conversations of
        other rows stay as they are.
        """
        partner, rules = self.task.partner, self.task.rules
        assert partner is not None
        conversations = list(conversations)
        num_answered = np.zeros(len(conversations), np.int32)

        def answers_to(spoke: np.ndarray) -> list[tuple[int, list[int], int, bool]]:
            """Row, token ids, their number, and whether the episode is done."""
            part = own_part(range(len(conversations)))
            mine = [i for i in spoke.tolist() if i in part]
            if not mine:
                return []
            some = mdp.at(state, np.array(mine))
            after, answers = partner.answer([conversations[i] for i in mine], some)
            for i, conversation in zip(mine, after, strict=True):
                conversations[i] = conversation
            return list(zip(mine, *(x.tolist() for x in answers), strict=True))

        while True:
            turns = mdp.turns_ended(state)
            parts = together(partial(answers_to, np.flatnonzero(turns > num_answered)))
            num_answered = turns
            if not mdp.waits(state).any():
                return pause, state, conversations
            answers = Answers(
                ids=np.zeros((len(conversations), rules.max_new_tokens), np.int32),
                length=np.zeros(len(conversations), np.int32),
                done=np.zeros(len(conversations), bool),
            )
            for i, *answer in (row for part in parts for row in part):
                answers.ids[i], answers.length[i], answers.done[i] = answer
            on_devices = jax.tree.map(lambda x: replicate(x, self._mesh), answers)
            pause = self._resume(params, pause, on_devices, greedy=greedy)
            state = fetch(pause.rollout.state)

    def _seeds(
        self, key: jax.Array, first_prompt: int, num_prompts: int, completions_per_prompt: int
    ) -> list[int]:
        """Of the rows' conversations; they depend on what the rows' keys depend on."""
        numbers = first_prompt + jnp.arange(num_prompts)
        keys = row_keys(key, numbers, completions_per_prompt)
        no_token = self.task.rules.max_new_tokens  # none has this number, and so this key
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, no_token)
        seeds: list[int] = np.asarray(jax.vmap(jax.random.bits)(keys)).tolist()
        return seeds

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
        """Any number of prompts, at most about `batch_size` at a time; the last batch is filled up.

        The completions of one prompt follow each other. After each batch, `on_batch` is told how
        many prompts are done.

        Raises:
            RewardError: as in `respond`.
        """
        num_devices = 1 if self._mesh is None else self._mesh.size
        num_batches = max(math.ceil(len(prompts) / batch_size), 1)
        per_device = math.ceil(max(len(prompts), 1) / num_batches / num_devices)
        batch_size = per_device * num_devices
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
                keeps_masks=False,
            )
            episodes += done.episodes[: len(batch) * completions_per_prompt]
            outcomes += done.outcomes[: len(batch) * completions_per_prompt]
            on_batch(start + len(batch))
        return episodes, outcomes
