"""QwenTextEnv: the token MDP as a Gymnasium environment, one episode at a time."""

import operator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded

from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.prompts import Prompt
from qwen_env.rendering import LiveText, render_episode
from qwen_env.sampling import PromptSampler
from qwen_env.task import Outcome, episodes_of, make_task, observe

Observation = dict[str, Any]  # of arrays; `spaces.Dict` is typed like this


class QwenTextEnv(gym.Env[Observation, Any]):
    """Text generation, one token at a time.

    ## Description
    A prompt is given; each action appends one token to it, until an end-of-sequence token is
    chosen or the response is full. Then a reward function scores the completion. With no
    arguments, the task is to complete short film reviews of a small grammar, and the reward is
    how positive the review is: it needs no network and no deep-learning library.

        import gymnasium
        import qwen_env  # registers QwenText-v0

        env = gymnasium.make("QwenText-v0", render_mode="human")
        observation, info = env.reset(seed=0)
        done = False
        while not done:
            mask = env.unwrapped.action_mask()
            action = env.action_space.sample(mask)
            observation, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated

    `gymnasium.make_vec("QwenText-v0", num_envs=N)` makes a `QwenTextVectorEnv`.

    ## Action Space
    `Discrete(vocab_size)`: the id of the token to append. Some ids may be forbidden: those in
    `forbidden_token_ids`, those of a padded vocabulary that have no text, and the end-of-sequence
    ids before `min_new_tokens`; `action_mask()` tells (int8, 1 is allowed), and taking a forbidden
    one raises `gymnasium.error.InvalidAction`.

    ## Observation Space
    A `Dict`, with S = `max_prompt_length` + `max_new_tokens`:

    | key              | space                          | meaning                              |
    |------------------|--------------------------------|--------------------------------------|
    | `input_ids`      | `Box`, int32, shape (S,)       | prompt, then response, then padding  |
    | `attention_mask` | `Box`, int8, shape (S,)        | 1 on prompt and response, 0 behind   |
    | `length`         | `Box`, int32, shape ()         | tokens of prompt and response        |
    | `prompt_length`  | `Box`, int32, shape ()         | tokens of the prompt                 |

    ## Starting State
    A prompt, drawn as `sampling` says, and an empty response.
    `reset(options={"prompt": text})`, `{"messages": chat}` and `{"prompt_index": i}` name one.

    ## Rewards
    0 until the episode ends, then the reward function's score, less `missing_eos_penalty` if the
    response was cut off. A KL penalty belongs to the learner, which has the log-probabilities.

    ## Episode End
    - Terminated: the action is an end-of-sequence id.
    - Truncated: the response holds `max_new_tokens` tokens, and the last is no end-of-sequence id.

    ## Information
    `reset` gives `prompt` (its text) and `prompt_index` (-1 if it came by the options). The last
    `step` of an episode gives `completion` (text without special tokens), `completion_length` (in
    tokens, the end-of-sequence token included), `finish_reason` ("eos" or "length") and
    `reward_components` (the `score`, the parts that the reward function names, and the
    `missing_eos_penalty` if there is one). Other steps give nothing.

    ## Arguments
    - `tokenizer`: a Hugging Face folder, a hub id, a `.gguf` file, or a tokenizer of the
      `tokenizers` or `transformers` packages. Default: the pocket task's.
    - `prompts`: the path of a `.jsonl` file, or a list or `datasets.Dataset` of texts or of rows
      with `"prompt"` or `"messages"`; other columns reach the reward function. Default: the pocket
      task's.
    - `reward`: a callable, or a string; see `qwen_env.rewards.load_reward`. Default: the pocket
      grammar's sentiment.
    - `max_prompt_length=32`, `max_new_tokens=32`: limits, in tokens.
    - `vocab_size`: the model's vocabulary size, if it is padded beyond the tokenizer's.
    - `eos_token_ids`: what ends the response. Default: what the tokenizer's folder says.
    - `chat_template`: `None` renders chats with the tokenizer's template and takes text as it is;
      `True`, or a template, also makes text a user's message; `False` takes no chats.
    - `system_prompt`: goes before every chat without a system message.
    - `prompt_overflow="error"`: what to do with a prompt over the limit; or `"drop"`, or
      `"truncate_left"`.
    - `sampling="uniform"`: how prompts are drawn; or `"shuffle"` (a new permutation each time
      round), or `"sequential"`. `reset(seed=...)` begins the order anew.
    - `min_new_tokens=0`: no end-of-sequence token can be chosen before the response has as many.
    - `forbidden_token_ids=()`: what can never be chosen.
    - `missing_eos_penalty=0.0`: taken from the reward of a response that was cut off.
    - `render_mode`: `"human"` prints the episode as it grows, `"ansi"` lets `render()` return it.

    Wrong arguments raise `qwen_env.errors.UsageError`, a `ValueError`.

    ## Version History
    - v0: initial version.
    """

    metadata = {"render_modes": ["human", "ansi"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, *, render_mode: str | None = None, **task_arguments: Any) -> None:
        if render_mode not in (None, "human", "ansi"):
            raise UsageError(f"render_mode is {render_mode!r}; it must be None, 'human' or 'ansi'.")
        self.render_mode = render_mode
        self.task = make_task(**task_arguments)
        self.action_space = self.task.action_space
        self.observation_space = self.task.observation_space
        self._sampler = PromptSampler(len(self.task.prompts), self.task.sampling)
        self._live_text = LiveText()
        self._state: mdp.State | None = None
        self._prompt: Prompt
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: also restarts the order of the prompts.
            options: one of `{"prompt": text}`, `{"messages": chat}`, `{"prompt_index": i}` names
                the prompt; otherwise it is drawn.

        Raises:
            UsageError: the options are wrong.
        """
        prompt = self.task.prompt_from_options(options)
        super().reset(seed=seed)
        if seed is not None:
            self._sampler.restart()
        if prompt is None:
            prompt = self.task.draw(self._sampler, self.np_random)
        self._prompt = prompt
        self._outcome = None
        self._state = mdp.State(*(field[0] for field in self.task.initial_state([prompt])))
        if self.render_mode == "human":
            self._live_text.finish()
            self._live_text.show(self._text(self._state))
        return observe(self._state), prompt.info()

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append the token `action`.

        Raises:
            gymnasium.error.InvalidAction: not an integer, outside the vocabulary, or forbidden.
            gymnasium.error.ResetNeeded: no episode is going.
            RewardError: the reward function failed.
        """
        state = self._state
        if state is None or mdp.has_ended(state):
            raise ResetNeeded("no episode is going; call reset() before step().")
        state = mdp.step(state, self._checked(action, state), self.task.rules, np)
        self._state = state
        terminated, truncated = bool(state.terminated), bool(state.truncated)
        reward, info = 0.0, {}
        if terminated or truncated:
            batch_of_one = mdp.State(*(field[None] for field in state))
            (self._outcome,) = self.task.evaluate(episodes_of([self._prompt], batch_of_one))
            reward, info = self._outcome.reward, self._outcome.info
        if self.render_mode == "human":
            self._live_text.show(self._text(state))
        return observe(state), reward, terminated, truncated, info

    def action_mask(self) -> np.ndarray:
        """The actions allowed now, int8 [V], as `action_space.sample(mask)` takes it.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before action_mask().")
        written = mdp.response_length(self._state)
        return mdp.action_mask(written, self.task.rules, np).astype(np.int8)

    def render(self) -> str | None:
        """The episode as text in mode "ansi"; "human" prints it at every reset and step itself."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode; make('QwenText-v0', render_mode='ansi')")
        if self._state is None:
            raise ResetNeeded("call reset() before render().")
        return self._text(self._state) if self.render_mode == "ansi" else None

    def _checked(self, action: Any, state: mdp.State) -> int:
        try:
            token = operator.index(action)
        except TypeError:
            raise InvalidAction(
                f"action {action!r} is not an integer; actions are token ids from 0 to "
                f"{self.task.rules.vocab_size - 1}."
            ) from None
        if not (
            0 <= token < self.task.rules.vocab_size
            and self.task.allows(token, mdp.response_length(state).item())
        ):
            raise InvalidAction(self.task.why_not(token))
        return token

    def _text(self, state: mdp.State) -> str:
        return render_episode(self._prompt.text, self.task.completion(state), self._outcome)
