"""QwenTextEnv: the token MDP as a Gymnasium environment, one episode at a time."""

import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.wrappers import TimeLimit

from qwen_env import mdp
from qwen_env.arguments import integer, one_of
from qwen_env.conversation import Conversation
from qwen_env.episodes import Outcome, episodes_of
from qwen_env.errors import UsageError
from qwen_env.prompt_order import PromptSampler
from qwen_env.prompts import Prompt
from qwen_env.rendering import LiveText, picture, render_episode
from qwen_env.task import make_task, takes_task_arguments

Observation = dict[str, Any]  # of arrays; `spaces.Dict` is typed like this


class QwenTextEnv(gym.Env[Observation, Any]):
    """Text generation, one token at a time.

    ## Description
    A prompt is given; each action appends one token to it, until an end-of-sequence token is
    chosen or the response is full. Then a reward function scores the completion. With no
    arguments, the task is to complete short film reviews of a small grammar, and the reward is
    how positive the review is: it needs no network and no deep-learning library.

    ```python
    import gymnasium
    import qwen_env  # registers QwenText-v0

    env = gymnasium.make("QwenText-v0", render_mode="human")
    observation, info = env.reset(seed=0)
    ended = False
    while not ended:
        mask = env.unwrapped.action_mask()
        action = env.action_space.sample(mask)
        observation, reward, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
    env.close()
    ```

    `gymnasium.make_vec("QwenText-v0", num_envs=N)` makes a `QwenTextVectorEnv`: N episodes
    are stepped in one call, and those that end together are scored in one call. Row i of one with
    seed s is this environment with seed s + i.

    ## Action Space
    `Discrete(vocab_size)`: the id of the token to append. Any integer type will do. Some ids may
    be forbidden: those in `forbidden_token_ids`, those of a padded vocabulary that have no text,
    and the end-of-sequence ids before `min_new_tokens`. `action_mask()` says which are allowed:
    int8 of shape (V,), 1 if allowed; (N, V) in the vector environment, whose `action_space.sample`
    takes it as a tuple of rows. `action_masks()`, for MaskablePPO, is the same as bool. An action
    that is forbidden, outside the vocabulary or not an integer raises
    `gymnasium.error.InvalidAction` and leaves the episode as it was.

    ## Observation Space
    A `Dict`, with S = `max_prompt_length` + `max_new_tokens`:

    | key              | space                          | meaning                              |
    |------------------|--------------------------------|--------------------------------------|
    | `input_ids`      | `Box`, int32, shape (S,)       | prompt, then response, then padding  |
    | `attention_mask` | `Box`, int8, shape (S,)        | 1 on prompt and response, 0 after    |
    | `length`         | `Box`, int32, shape (1,)       | tokens of prompt and response        |
    | `prompt_length`  | `Box`, int32, shape (1,)       | tokens of the prompt                 |
    | `response_mask`  | `Box`, int8, shape (S,)        | 1 on the tokens that were actions    |

    The last one is there if there is an `interaction`, whose replies are no actions.

    ## Starting State
    A prompt and an empty response. `prompt_order` says which prompt comes next, unless one of the
    options of `reset` names it:

    - `{"prompt": text}`: this text, treated as those of `prompts` are;
    - `{"messages": [{"role": ..., "content": ...}, ...]}`: this chat, in the chat template;
    - `{"prompt_index": i}`: prompt number i of the source, from 0.

    With an `interaction`, `{"episode_seed": n}`, alone or beside one of these, is what its own
    chances come from, an integer from 0 to 2**32 - 1; it is drawn otherwise.

    `reset(seed=s)` also restarts the order of the prompts: equal seeds, equal episodes. In the
    vector environment the options hold for every row that is reset, and one more chooses the rows:
    `{"reset_mask": mask}`, a NumPy array of bool of shape (N,).

    ## Rewards
    0 until the episode ends, then the reward function's score, less `missing_eos_penalty` if the
    response was cut off. An `interaction` may reward each turn beside, at its last token. A KL
    penalty belongs to the learner, which has the log-probabilities.

    A reward function takes a `qwen_env.rewards.RewardBatch` of finished episodes (prompts,
    completions, their token ids, the rows of the dataset, how they ended) and returns a number for
    each, or `(numbers, {name: numbers})` to report components beside the score. If it raises, or
    returns too few or too many values, or one that is not a finite number, `step` raises
    `qwen_env.rewards.RewardError`, which names the function and the row; the step is not taken.

    ## Turns
    The action that is an end-of-sequence id, or with which the turn contains one of the `stop`
    strings, ends a turn. Within the same step an `interaction` is asked for a reply, whose tokens
    are appended; the next action begins the next turn. Stop strings and `min_new_tokens` begin anew
    with each turn; what stands in prompts and replies ends nothing. Without an interaction there is
    one turn. See docs/turns.md.

    ## Episode End
    - Terminated: the last of `max_turns` turns has ended, or the interaction ends the episode.
    - Truncated: all that follows the prompt comes to `max_new_tokens` tokens, or a reply has no
      room with an action behind it, and the episode is not terminated.

    A step after that, or before the first `reset`, raises `gymnasium.error.ResetNeeded`. A
    `max_episode_steps` below `max_new_tokens` is refused: Gymnasium's `TimeLimit` would cut
    episodes off before they are scored.

    The vector environment resets rows as `autoreset_mode` says, in Gymnasium's terms:

    - `"NextStep"`: by the next step, which ignores the row's action and gives it reward 0;
    - `"SameStep"`: within the step that ends the episode, whose last observation and info are then
      in `info["final_obs"]` and `info["final_info"]`;
    - `"Disabled"`: by `reset(options={"reset_mask": mask})`, before which no step can be taken.

    ## Information
    `reset` gives `prompt` (its text) and `prompt_index` (its number in the source, from 0; -1 if
    its text or chat came from the options). The last `step` of an episode gives `completion` (text
    without special tokens), `completion_length` (in tokens, the end-of-sequence token included),
    `finish_reason` ("eos", "stop" or "length"; with an interaction also "done", by its word, or
    "overflow", for want of room) and `reward_components` (the `score`, the parts that the reward
    function names, the `missing_eos_penalty` if there is one, and the sum of the `turn_rewards` if
    there is an interaction). If there is one, a step that ended a turn gives `turn` (its number,
    from 1), `reply` (as text) and, if the reply has any, `reply_info`. Other steps give nothing.

    In the vector environment each key holds an array over the rows, and the key with an underscore
    before it (`_completion`) the bool mask of the rows that have it.

    ## Arguments
    - `tokenizer=None`: a Hugging Face folder, a hub id, a `.gguf` file, or a tokenizer of the
      `tokenizers` or `transformers` packages. Default: the pocket task's.
    - `prompts=None`: the path of a `.jsonl` file, or a list or `datasets.Dataset` of texts or of
      rows with `"prompt"` (text) or `"messages"` (a chat), which may have `"tools"`; other columns
      reach the reward function. Default: the task's, or the pocket task's.
    - `reward`: a callable, or the name of one: `"package.module:callable"`; or
      `"hf:FOLDER_OR_HUB_ID"`, a sequence-classification model run by `transformers`, with options
      as in `"hf:FOLDER?device=cuda&dtype=bfloat16&batch_size=64"`; or `"http://HOST:PORT/PATH"`, a
      reward server (see `qwen_env.rewards.http`, also for time limits); or a weighted sum,
      `"1.0 * SPEC + 0.2 * SPEC"` or `{name: (weight, reward)}`. Default: the pocket grammar's
      sentiment.
    - `task=None`: prompts and the reward that verifies the answers, by one name: `"gsm8k"`, or
      `"gsm8k:FOLDER_OR_FILE"`; `"reasoning_gym:NAME"`, a task of that package with options as in
      `"reasoning_gym:chain_sum?min_terms=3&max_terms=4&size=2000"`; `"guess_the_number"`,
      `"calculator"` and `"textarena:GAME"`, a game of that package with options likewise, which
      have an interaction as well; or `"package.module:callable"`, which makes a
      `qwen_env.tasks.NamedTask`; or such a task itself. `prompts` may name others whose rows have
      the same columns, such as its `held_out`; `reward` must be left out.
    - `max_prompt_length=None`: the longest prompt, in tokens. Default: 32, or the longest that a
      `task` has.
    - `max_new_tokens=32`: the longest response, in tokens. With 1, Gymnasium's `check_env` fails
      ("truncates after 1 step"): it requires at least two.
    - `vocab_size=None`: the model's vocabulary size, if it is padded beyond the tokenizer's.
    - `eos_token_ids=None`: the id, or ids, that end the response. Default: what the tokenizer's
      folder says.
    - `stop=()`: a text, or texts, that end the response once it contains one. The completion keeps
      it. It is looked for in what the tokens spell, across their borders; the prompt and special
      tokens do not count.
    - `chat_template=None`: `None` renders chats with the tokenizer's template and takes text as it
      is; `True`, or a template, or the name of one of the tokenizer's, also makes text a user's
      message; `False` takes no chats.
    - `chat_template_kwargs=None`: arguments of `apply_chat_template`, such as
      `{"continue_final_message": True}` or variables for the template
      (`{"enable_thinking": False}`); a row may have its own in a column of this name.
    - `system_prompt=None`: goes before every chat without a system message.
    - `prompt_overflow="error"`: what to do with a prompt over the limit; or `"drop"`, or
      `"truncate_left"`.
    - `prompt_order="uniform"`: how prompts are drawn; or `"shuffle"` (a new permutation in each
      round), or `"sequential"`.
    - `interaction=None`: what replies to the turns: a function of a `TurnBatch`, an object with a
      method `reply`, or the name of one of these, `"package.module:name"`; see
      `qwen_env.interaction`. Default: the task's, or none.
    - `max_turns=None`: the most turns of an episode. Default: the task's, or 1.
    - `min_new_tokens=0`: no end-of-sequence token can be chosen, and no stop string ends the
      response, before it has this many tokens.
    - `forbidden_token_ids=()`: ids that can never be chosen.
    - `missing_eos_penalty=0.0`: taken from the reward of a response that was cut off.
    - `render_mode=None`: `"human"` prints the episode as it grows, `"ansi"` lets `render()` return
      it as text, `"rgb_array"` as a picture of text, for videos.

    `make_vec` takes the same (except the render mode `"human"`), and:

    - `num_envs=1`: the number of rows, N.
    - `autoreset_mode="NextStep"`: or `"SameStep"`, or `"Disabled"`; see Episode End.

    Wrong arguments raise `qwen_env.errors.UsageError`, a `ValueError`, and a missing optional
    package `gymnasium.error.DependencyNotInstalled`; both say what to do.

    ## Version History
    - v0: initial version.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["human", "ansi", "rgb_array"],
        "render_fps": 30,
    }

    @takes_task_arguments
    def __init__(self, *, render_mode: str | None = None, **task_arguments: Any) -> None:
        if render_mode is not None:
            one_of("render_mode", render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.task = make_task(**task_arguments)
        self.action_space = self.task.action_space
        self.observation_space = self.task.observation_space
        self._prompt_sampler = PromptSampler(len(self.task.prompts), self.task.prompt_order)
        self._live_text = LiveText()
        self._state: mdp.State | None = None
        self._prompt: Prompt
        self._conversation: Conversation | None = None
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: an integer from 0, NumPy's too; also restarts the order of the prompts.
            options: one of `{"prompt": text}`, `{"messages": chat}`, `{"prompt_index": i}` names
                the prompt; otherwise it is drawn.

        Raises:
            UsageError: the options are wrong, or a `TimeLimit` would cut episodes off unscored.
        """
        self.task.check_time_limit(_time_limit_around(self))
        prompt = self.task.prompt_from_options(options)
        super().reset(seed=int(seed) if isinstance(seed, np.integer) else seed)
        if seed is not None:
            self._prompt_sampler.restart()
        if prompt is None:
            prompt = self.task.prompts[self._prompt_sampler.sample(self.np_random)]
        self._prompt = prompt
        self._conversation = self.task.conversation(prompt, options, self.np_random)
        self._outcome = None
        self._state = mdp.at(self.task.initial_state([prompt]), 0)
        if self.render_mode == "human":
            self._live_text.finish()
            self._live_text.show(self._text(self._state))
        return self.task.observe(self._state), prompt.info()

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append the token `action`.

        Raises:
            gymnasium.error.InvalidAction: not an integer, outside the vocabulary, or forbidden.
            gymnasium.error.ResetNeeded: no episode is under way.
            qwen_env.rewards.RewardError: the reward function failed; the step was not taken.
            qwen_env.errors.InteractionError: the interaction did, or its reply; likewise.
        """
        before, rules, conversation = self._state, self.task.rules, self._conversation
        if before is None or mdp.has_ended(before):
            raise ResetNeeded("no episode is under way; call reset() before step().")
        state = mdp.step(before, self._checked(action, before), rules, np)
        reward, info, outcome = 0.0, {}, None
        if (partner := self.task.partner) and conversation and _ended_turn(before, state):
            (conversation,), answers = partner.answer([conversation], mdp.at(state, None))
            reward, info = conversation.turn_rewards[-1][1], conversation.info()
            if rules.max_turns > 1:
                ids, length, done = (x[0] for x in answers)
                state = mdp.reply(state, ids, length, done, rules, np)
        terminated, truncated = bool(state.terminated), bool(state.truncated)
        if terminated or truncated:
            (episode,) = episodes_of([self._prompt], mdp.at(state, None), [conversation])
            (outcome,) = self.task.evaluate([episode])
            reward, info = reward + outcome.last_reward, info | outcome.info
        self._state, self._conversation, self._outcome = state, conversation, outcome
        if self.render_mode == "human":
            self._live_text.show(self._text(state))
        return self.task.observe(state), reward, terminated, truncated, info

    def action_mask(self) -> np.ndarray:
        """The actions allowed now, int8 [V], as `action_space.sample(mask)` takes it.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before action_mask().")
        written = mdp.turn_length(self._state)
        allowed: np.ndarray = mdp.action_mask(written, self.task.rules, np)
        return allowed.astype(np.int8)

    def action_masks(self) -> np.ndarray:
        """`action_mask` as bool [V], under the name that MaskablePPO of sb3-contrib asks for."""
        return self.action_mask().astype(bool)

    def render(self) -> str | np.ndarray | None:
        """The episode as text in mode "ansi", as a picture of it (uint8 [480, 800, 3]) in mode
        "rgb_array"; "human" prints it at every reset and step itself."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode; make('QwenText-v0', render_mode='ansi')")
        if self._state is None:
            raise ResetNeeded("call reset() before render().")
        if self.render_mode == "ansi":
            return self._text(self._state)
        return picture(self._text(self._state)) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """End the line that mode "human" is writing; there is nothing else to close."""
        self._live_text.finish()

    def _checked(self, action: Any, state: mdp.State) -> int:
        try:
            token = integer("action", action)
        except UsageError:
            raise InvalidAction(
                f"action {action!r} is not an integer; actions are token ids from 0 to "
                f"{self.task.rules.vocab_size - 1}."
            ) from None
        if not (
            0 <= token < self.task.rules.vocab_size
            and self.task.allows(token, mdp.turn_length(state).item())
        ):
            raise InvalidAction(self.task.why_not(token))
        return token

    def _text(self, state: mdp.State) -> str:
        text = self.task.text_so_far(state, self._conversation)
        return render_episode(self._prompt.text, text, self._outcome)


def _ended_turn(before: mdp.State, after: mdp.State) -> bool:
    return bool(mdp.turns_ended(after) > mdp.turns_ended(before))


def _time_limit_around(env: QwenTextEnv) -> int | None:
    """The steps that a `TimeLimit` around `env` allows, if one of its callers is one.

    Gymnasium tells an environment nothing of the wrappers around it, so this looks who calls.
    """
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_code is TimeLimit.reset.__code__:
            wrapper: TimeLimit = frame.f_locals["self"]
            if wrapper.unwrapped is env:
                return wrapper._max_episode_steps
        frame = frame.f_back
    return None
