"""QwenTextVectorEnv: many episodes at once over the batched MDP, rewards scored in batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from qwen_env import mdp
from qwen_env.arguments import integer, one_of
from qwen_env.conversation import Conversation
from qwen_env.env import Observation
from qwen_env.episodes import Outcome, episodes_of
from qwen_env.errors import UsageError
from qwen_env.prompt_order import PromptSampler
from qwen_env.prompts import Prompt
from qwen_env.rendering import picture, render_episode
from qwen_env.task import make_task, takes_task_arguments


class QwenTextVectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray]):
    """`num_envs` copies of `QwenTextEnv` that are stepped together.

    Row i of an environment with seed s is the single environment with seed s + i. The rows that
    end in one step are scored in one call of the reward function. `QwenTextEnv` describes the
    arguments, the options and the three values of `autoreset_mode`.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 30,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    @takes_task_arguments
    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **task_arguments: Any,
    ) -> None:
        num_envs = integer("num_envs", num_envs, at_least=1)
        if render_mode is not None:
            one_of("render_mode", render_mode, self.metadata["render_modes"])
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            modes = ", ".join(repr(mode.value) for mode in AutoresetMode)
            raise UsageError(
                f"autoreset_mode is {autoreset_mode!r}; it must be one of {modes}."
            ) from None
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        self.num_envs = num_envs
        self.render_mode = render_mode
        time_limit = task_arguments.pop("max_episode_steps", None)  # `make_vec` passes it on
        self.task = make_task(**task_arguments)
        self.task.check_time_limit(time_limit)
        self.single_action_space = self.task.action_space
        self.single_observation_space = self.task.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

        num_prompts = len(self.task.prompts)
        self._prompt_samplers = [
            PromptSampler(num_prompts, self.task.prompt_order) for _ in range(num_envs)
        ]
        self._rngs = [seeding.np_random() for _ in range(num_envs)]
        self._state: mdp.State | None = None
        self._prompts: dict[int, Prompt] = {}  # by row, as are the outcomes
        self._outcomes: dict[int, Outcome | None] = {}
        self._conversations: dict[int, Conversation | None] = {}  # none without an interaction

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The rows' generators."""
        return tuple(rng for rng, _ in self._rngs)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The rows' seeds."""
        return tuple(seed for _, seed in self._rngs)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: row i gets `seed + i`, or `seed[i]`.
            options: `"reset_mask"` (bool [N]) chooses the rows, otherwise all are reset; the other
                options are those of `QwenTextEnv.reset`, for every row that is reset.

        Raises:
            UsageError: the options are wrong.
        """
        mask = self._checked_mask(options)
        if isinstance(options, Mapping):
            options = {key: value for key, value in options.items() if key != "reset_mask"}
        prompt = self.task.prompt_from_options(options)
        rows = np.flatnonzero(mask)
        seeds = self._seeds(seed)
        seeded = {i: seeding.np_random(seeds[i]) for i in rows.tolist() if seeds[i] is not None}
        for i, rng in seeded.items():
            self._rngs[i] = rng
            self._prompt_samplers[i].restart()
        infos = self._start(rows, prompt, options)
        return self.task.observe(self._started_state()), infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append one token to every row; a row that "NextStep" resets ignores its action.

        Raises:
            gymnasium.error.InvalidAction: not an integer, outside the vocabulary, or forbidden.
            gymnasium.error.ResetNeeded: before the first reset, or a row ended ("Disabled").
            qwen_env.rewards.RewardError: the reward function failed; the step was not taken.
            qwen_env.errors.InteractionError: the interaction did, or one of its replies; likewise.
        """
        state = self._started_state()
        had_ended = mdp.has_ended(state)
        if self.autoreset_mode is AutoresetMode.DISABLED and had_ended.any():
            raise ResetNeeded(
                f"the episode of row {np.flatnonzero(had_ended)[0]} has ended; "
                "call reset(options={'reset_mask': mask})."
            )
        actions = self._checked_actions(actions, state, ~had_ended)
        before, state = state, mdp.step(state, actions, self.task.rules, np)

        rewards = np.zeros(self.num_envs)
        infos_by_row: dict[int, dict[str, Any]] = {}
        conversations = self._conversations
        if self.task.partner is not None:
            spoke = np.flatnonzero(mdp.turns_ended(state) > mdp.turns_ended(before))
            state, conversations = self._answered(spoke, state, rewards, infos_by_row)
        ended = np.flatnonzero(mdp.has_ended(state) & ~had_ended)
        outcomes = self._evaluated(ended, state, conversations)
        for i, outcome in outcomes.items():
            rewards[i] += outcome.last_reward
            infos_by_row[i] = infos_by_row[i] | outcome.info if i in infos_by_row else outcome.info
        self._state, self._conversations = state, conversations
        self._outcomes.update(outcomes)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            terminations, truncations = state.terminated.copy(), state.truncated.copy()
            final_infos = {i: infos_by_row.pop(i) for i in outcomes}
            infos = _batch_infos(infos_by_row, self.num_envs)
            if outcomes:
                final_obs = np.full(self.num_envs, None)
                final_obs[ended] = [self.task.observe(mdp.at(state, i)) for i in ended.tolist()]
                is_final = terminations | truncations
                infos |= {
                    "final_obs": final_obs,
                    "_final_obs": is_final,
                    "final_info": _batch_infos(final_infos, self.num_envs),
                    "_final_info": is_final.copy(),
                }
            infos |= self._start(ended)
        else:
            infos = _batch_infos(infos_by_row, self.num_envs)
            infos |= self._start(np.flatnonzero(had_ended))
            terminations, truncations = state.terminated.copy(), state.truncated.copy()
        return self.task.observe(state), rewards, terminations, truncations, infos

    def action_mask(self) -> np.ndarray:
        """The actions allowed now, int8 [N, V]; `action_space.sample` takes it as a tuple.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        written = mdp.turn_length(self._started_state())
        allowed: np.ndarray = mdp.action_mask(written, self.task.rules, np)
        return allowed.astype(np.int8)

    def render(self) -> tuple[str, ...] | tuple[np.ndarray, ...] | None:
        """The episodes as texts in mode "ansi", as pictures of them in mode "rgb_array"."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode; make_vec(..., render_mode='ansi')")
            return None
        state = self._started_state()
        texts = tuple(
            render_episode(
                self._prompts[i].text,
                self.task.text_so_far(mdp.at(state, i), self._conversations.get(i)),
                self._outcomes[i],
            )
            for i in range(self.num_envs)
        )
        return texts if self.render_mode == "ansi" else tuple(map(picture, texts))

    def _started_state(self) -> mdp.State:
        if self._state is None:
            raise ResetNeeded("no episodes are under way; call reset() first.")
        return self._state

    def _start(
        self,
        rows: np.ndarray,
        prompt: Prompt | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Begin an episode in each of `rows`, with `prompt` or one drawn; return their infos."""
        if not len(rows):
            return {}
        indices = rows.tolist()
        prompts = [
            prompt or self.task.prompts[self._prompt_samplers[i].sample(self._rngs[i][0])]
            for i in indices
        ]
        fresh = self.task.initial_state(prompts)
        if self._state is None:
            self._state = mdp.at(fresh, rows)  # all of them, as arrays that may be written to
        else:
            for field, value in zip(self._state, fresh, strict=True):
                if field is not None:
                    field[rows] = value
        for i, new in zip(indices, prompts, strict=True):
            self._prompts[i], self._outcomes[i] = new, None
        if self.task.partner is not None:
            for i, new in zip(indices, prompts, strict=True):
                self._conversations[i] = self.task.conversation(new, options, self._rngs[i][0])
        infos = {i: new.info() for i, new in zip(indices, prompts, strict=True)}
        return _batch_infos(infos, self.num_envs)

    def _answered(
        self,
        rows: np.ndarray,
        state: mdp.State,
        rewards: np.ndarray,
        infos: dict[int, dict[str, Any]],
    ) -> tuple[mdp.State, dict[int, Conversation | None]]:
        """Ask about the turns that ended in `rows`; return the states and the conversations behind
        the replies. What the turns earned goes into `rewards`, what there is to say into `infos`.
        """
        partner, indices = self.task.partner, rows.tolist()
        if partner is None or not indices:
            return state, self._conversations
        some = mdp.at(state, rows)
        talks = [talk for i in indices if (talk := self._conversations[i]) is not None]
        after, answers = partner.answer(talks, some)
        for i, conversation in zip(indices, after, strict=True):
            rewards[i], infos[i] = conversation.turn_rewards[-1][1], conversation.info()
        if self.task.rules.max_turns > 1:
            state = mdp.put(state, rows, mdp.reply(some, *answers, self.task.rules, np))
        return state, self._conversations | dict(zip(indices, after, strict=True))

    def _evaluated(
        self, rows: np.ndarray, state: mdp.State, conversations: Mapping[int, Conversation | None]
    ) -> dict[int, Outcome]:
        """The outcomes of the episodes that ended in `rows`, scored in one call."""
        indices = rows.tolist()
        if not indices:
            return {}
        prompts = [self._prompts[i] for i in indices]
        talks = [conversations.get(i) for i in indices]
        outcomes = self.task.evaluate(episodes_of(prompts, mdp.at(state, rows), talks))
        return dict(zip(indices, outcomes, strict=True))

    def _seeds(self, seed: Any) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if not isinstance(seed, Sequence | np.ndarray) or len(seed) != self.num_envs:
            raise UsageError(
                f"seed is {seed!r}; it must be an integer, or a list of {self.num_envs} integers "
                "or None, one per row."
            )
        return [int(s) if isinstance(s, np.integer) else s for s in seed]

    def _checked_mask(self, options: Any) -> np.ndarray:
        mask = options.get("reset_mask") if isinstance(options, Mapping) else None
        if mask is None:
            return np.ones(self.num_envs, dtype=bool)
        shape = (self.num_envs,)
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != shape:
            raise UsageError(f"reset_mask must be a NumPy array of bool of shape {shape}.")
        if not mask.any():
            raise UsageError("reset_mask chooses no row; set at least one of its values.")
        if self._state is None and not mask.all():
            raise UsageError("the first reset starts every row; leave reset_mask out.")
        return mask

    def _checked_actions(self, actions: Any, state: mdp.State, running: np.ndarray) -> np.ndarray:
        try:
            tokens = np.asarray(actions)
        except ValueError as error:  # rows of unequal lengths
            raise InvalidAction(
                f"the actions are {actions!r}; they must be integers of shape ({self.num_envs},)."
            ) from error
        if tokens.shape != (self.num_envs,) or not np.issubdtype(tokens.dtype, np.integer):
            raise InvalidAction(
                f"the actions are {tokens.dtype} of shape {tokens.shape}; they must be integers "
                f"of shape ({self.num_envs},), from 0 to {self.task.rules.vocab_size - 1}."
            )
        is_id = (tokens >= 0) & (tokens < self.task.rules.vocab_size)
        ids = np.where(is_id, tokens, 0)
        is_allowed = is_id & self.task.allows(ids, mdp.response_length(state))
        refused = np.flatnonzero(running & ~is_allowed)
        if len(refused):
            i = refused[0]
            raise InvalidAction(f"row {i}: {self.task.why_not(int(tokens[i]))}")
        return ids


def _batch_infos(infos: Mapping[int, dict[str, Any]], num_envs: int) -> dict[str, Any]:
    """Infos by row, in Gymnasium's form for vector environments.

    Each key holds an array over all rows, and `_key` the mask of those that have it.
    """
    batch: dict[str, Any] = {}
    everyone = list(infos)
    for key in dict.fromkeys(key for info in infos.values() for key in info):
        rows = [i for i in everyone if key in infos[i]]
        values = [infos[i][key] for i in rows]
        kind, *others = set(map(type, values))
        if kind is dict and not others:
            batch[key] = _batch_infos(dict(zip(rows, values, strict=True)), num_envs)
        else:
            is_number = kind in (bool, int, float) and not others
            batch[key] = column = np.zeros(num_envs, kind) if is_number else np.full(num_envs, None)
            if is_number or (kind is str and not others):
                column[rows] = values
            else:  # a list, which is one value here
                for i, value in zip(rows, values, strict=True):
                    column[i] = value
        batch[f"_{key}"] = mask = np.zeros(num_envs, dtype=bool)
        mask[rows] = True
    return batch
