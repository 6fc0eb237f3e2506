"""A text task: prompts, the rules of the MDP, and a reward.

Everything that the single and the vector environment share, and nothing that changes from step to
step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import Signature, signature
from typing import Any, get_args

import numpy as np
from gymnasium import spaces

from qwen_env import mdp, pocket
from qwen_env.arguments import finite, integer, one_of, texts, token_ids
from qwen_env.conversation import Conversation, Partner
from qwen_env.episodes import Episode, Outcome, outcomes_of, reward_batch
from qwen_env.errors import UsageError
from qwen_env.interaction import load_interaction
from qwen_env.prompt_order import PromptOrder
from qwen_env.prompts import Overflow, Prompt, PromptDataset, PromptEncoder, load_prompts
from qwen_env.replies import ReplyEncoder
from qwen_env.rewards import RewardFn, load_reward, score
from qwen_env.rewards.sentiment import pocket_sentiment
from qwen_env.stop_strings import StopStrings, make_stop_strings
from qwen_env.tasks import load_named_task
from qwen_env.tokenizer import Tokenizer, load_tokenizer
from qwen_env.tokenizer.token_bytes import special_tokens, token_bytes

_RESET_OPTIONS = ("prompt", "messages", "prompt_index")

_DEFAULT_PROMPT_LENGTH = 32
_ANY_LENGTH = 2**30  # leaves room for a response in an int32


@dataclass(frozen=True)
class TextTask:
    """Prompts, the rules of the MDP, and a reward; `make_task` builds and checks one.

    `prompt_encoder` is what tokenised the prompts; it also tokenises those that the options of a
    reset bring. `missing_eos_penalty` is taken from the reward of a response that was cut off.
    `answer_of` is a named task's: the answer that a completion gives, in a normal form; None where
    it gives none.
    """

    tokenizer: Tokenizer
    prompts: PromptDataset
    prompt_encoder: PromptEncoder
    prompt_order: PromptOrder
    rules: mdp.Rules
    reward: RewardFn
    missing_eos_penalty: float
    answer_of: Callable[[str], str | None] | None = None
    partner: Partner | None = None

    @property
    def action_space(self) -> spaces.Discrete:
        """The ids of the vocabulary, forbidden ones included."""
        return spaces.Discrete(self.rules.vocab_size)

    @property
    def observation_space(self) -> spaces.Dict:
        """The space of what `observe` makes of one state."""
        width, last_id = self.rules.max_length, self.rules.vocab_size - 1
        mask = spaces.Box(0, 1, (width,), np.int8)
        return spaces.Dict(
            {
                "input_ids": spaces.Box(0, last_id, (width,), np.int32),
                "attention_mask": mask,
                # Not of shape (): agents that flatten an observation want at least one axis.
                "length": spaces.Box(1, width, (1,), np.int32),
                # From 0, which no length is: Gymnasium warns of a box that holds a single value.
                "prompt_length": spaces.Box(0, self.rules.max_prompt_length, (1,), np.int32),
                **({} if self.partner is None else {"response_mask": mask}),
            }
        )

    def observe(self, state: mdp.State) -> dict[str, np.ndarray]:
        """The observation of one state or of a batch: new arrays, which the caller may keep."""
        observation = {
            "input_ids": state.tokens.copy(),
            "attention_mask": mdp.attention_mask(state, np).view(np.int8),
            "length": np.array(state.length)[..., None],
            "prompt_length": np.array(state.prompt_length)[..., None],
        }
        if self.partner is not None:
            observation["response_mask"] = mdp.own_mask(state, np).astype(np.int8)
        return observation

    @cached_property
    def _allowed(self) -> np.ndarray:
        """bool [2, V]: the action masks before and from `min_new_tokens` on."""
        num_written = np.array([0, self.rules.min_new_tokens])
        masks: np.ndarray = mdp.action_mask(num_written, self.rules, np)
        return masks

    def allows(self, tokens: Any, num_written: Any) -> Any:
        """bool [...]: whether ids inside the vocabulary can be chosen after `num_written` others.

        `mdp.action_mask` as a lookup, which costs no more than the ids that are asked for.
        """
        is_late = num_written >= self.rules.min_new_tokens
        return self._allowed[is_late * 1, tokens]

    def why_not(self, token: int) -> str:
        """One sentence that says why `token` cannot be chosen."""
        last = self.rules.vocab_size - 1
        if not 0 <= token <= last:
            return f"action {token} is outside the vocabulary; ids run from 0 to {last}."
        return (
            f"action {token} is forbidden here; action_mask() tells which of the ids 0 to {last} "
            "are allowed."
        )

    def check_time_limit(self, max_episode_steps: int | None) -> None:
        """Refuse a limit of Gymnasium's that would cut episodes off before they are scored.

        Raises:
            UsageError: it is below `max_new_tokens`.
        """
        limit = self.rules.max_new_tokens
        if max_episode_steps is not None and max_episode_steps < limit:
            raise UsageError(
                f"max_episode_steps is {max_episode_steps}, so Gymnasium's TimeLimit would cut "
                f"episodes off before they are scored; set max_new_tokens (now {limit}) instead."
            )

    def initial_state(self, prompts: Sequence[Prompt]) -> mdp.State:
        """The states [N] before the first action."""
        ids = np.zeros((len(prompts), self.rules.max_prompt_length), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        lengths = [len(prompt.ids) for prompt in prompts]
        return mdp.initial_state(ids, lengths, self.rules, np)

    @cached_property
    def _prompts_by_index(self) -> dict[int, Prompt]:
        return {prompt.index: prompt for prompt in self.prompts}

    def prompt_from_options(self, options: Mapping[str, Any] | None) -> Prompt | None:
        """The prompt that the options of a reset name, if they name one.

        Raises:
            UsageError: an unknown option, two prompts at once, or a wrong value.
        """
        if options is not None and not isinstance(options, Mapping):
            raise UsageError(
                f"the options of reset are a {type(options).__name__}; they must be a dict such as "
                "{'prompt': text}."
            )
        if options and self.partner is not None:
            options = {name: options[name] for name in options if name != "episode_seed"}
        if not options:
            return None
        unknown = [key for key in options if key not in _RESET_OPTIONS]
        if unknown or len(options) > 1:
            raise UsageError(
                f"reset got the options {', '.join(map(repr, options))}; "
                f"it takes one of {', '.join(map(repr, _RESET_OPTIONS))}."
            )
        if "prompt_index" not in options:
            encoder = self.prompt_encoder
            if encoder.overflow == "drop":  # what was asked for is never silently dropped
                encoder = replace(encoder, overflow="error")
            return encoder.encode(options, index=-1, place="the option of reset")
        index = integer("prompt_index", options["prompt_index"])
        if index not in self._prompts_by_index:
            raise UsageError(
                f"prompt_index is {index}; it must be the number of a prompt that was not dropped, "
                f"from {min(self._prompts_by_index)} to {max(self._prompts_by_index)}."
            )
        return self._prompts_by_index[index]

    def conversation(
        self, prompt: Prompt, options: Mapping[str, Any] | None, rng: np.random.Generator
    ) -> Conversation | None:
        """The beginning of an episode's conversation, if there is an interaction.

        Args:
            options: of a reset; `episode_seed`, or else a draw, is where the interaction's own
                chances come from.

        Raises:
            UsageError: `episode_seed` is no integer from 0 to 2**32 - 1.
        """
        if self.partner is None:
            return None
        seed = int(rng.integers(2**32))
        if options and "episode_seed" in options:
            seed = integer("episode_seed", options["episode_seed"], at_least=0)
            if seed >= 2**32:
                raise UsageError(f"episode_seed is {seed}; it must be below 2**32.")
        return self.partner.start(prompt, seed)

    def text_so_far(self, state: mdp.State, conversation: Conversation | None) -> str:
        """What follows the prompt in `state`, which has no batch axis: in a conversation, each
        message but the first with its role before it, on a line of its own."""
        start = mdp.turn_start(state)
        turn = self.tokenizer.decode_after(state.tokens[:start], state.tokens[start : state.length])
        if conversation is None:
            return turn
        said = conversation.messages[len(self.prompt_encoder.messages_of(conversation.prompt)) :]
        if mdp.is_running(state) or mdp.was_cut_off(state):  # this turn is not among them yet
            said = (*said, {"role": "assistant", "content": turn})
        first, *rest = said
        lines = [first["content"], *(f"{m['role']}: {m['content']}" for m in rest)]
        return "\n".join(lines)

    def evaluate(self, episodes: Sequence[Episode]) -> list[Outcome]:
        """Score finished episodes in one call of the reward function.

        Raises:
            RewardError: the reward function raised, or its answer cannot be a reward.
        """
        batch = reward_batch(episodes, self.prompt_encoder)
        scores = score(self.reward, batch)
        return outcomes_of(episodes, batch, scores, self.missing_eos_penalty)


def make_task(
    *,
    tokenizer: Any = None,
    prompts: Any = None,
    reward: Any = pocket_sentiment,
    task: Any = None,
    max_prompt_length: int | None = None,
    max_new_tokens: int = 32,
    vocab_size: int | None = None,
    eos_token_ids: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    chat_template: bool | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    prompt_overflow: Overflow = "error",
    prompt_order: PromptOrder = "uniform",
    interaction: Any = None,
    max_turns: int | None = None,
    min_new_tokens: int = 0,
    forbidden_token_ids: Sequence[int] = (),
    missing_eos_penalty: float = 0.0,
) -> TextTask:
    """Build and check a task. The arguments are those of `QwenText-v0`; see `QwenTextEnv`.

    Raises:
        UsageError: an argument is wrong.
    """
    one_of("prompt_order", prompt_order, get_args(PromptOrder))
    named = None if task is None else load_named_task(task)
    if named is not None and reward is not pocket_sentiment:
        raise UsageError(
            f"The task {named.name} has a reward of its own; leave task or reward out."
        )
    if named is not None and named.interaction is not None:
        if interaction is not None:
            raise UsageError(
                f"The task {named.name} has an interaction of its own; leave task or interaction "
                "out."
            )
        interaction = named.interaction
        max_turns = named.max_turns if max_turns is None else max_turns
    max_turns = 1 if max_turns is None else integer("max_turns", max_turns, at_least=1)
    if interaction is None and max_turns > 1:
        raise UsageError(
            f"max_turns is {max_turns}, but there is no interaction that would reply between them; "
            "name one, or leave max_turns out."
        )
    fits_longest = max_prompt_length is None and named is not None
    if max_prompt_length is None:
        max_prompt_length = _ANY_LENGTH if fits_longest else _DEFAULT_PROMPT_LENGTH
    missing_eos_penalty = finite("missing_eos_penalty", missing_eos_penalty)
    if missing_eos_penalty < 0:
        raise UsageError(
            f"missing_eos_penalty is {missing_eos_penalty}; it is taken from the reward, so it "
            "must not be negative."
        )
    tokenizer = load_tokenizer(pocket.POLICY_FOLDER if tokenizer is None else tokenizer)
    size = tokenizer.vocab_size if vocab_size is None else integer("vocab_size", vocab_size)
    if size < tokenizer.vocab_size:
        raise UsageError(
            f"vocab_size is {size}, but the tokenizer has {tokenizer.vocab_size} ids; "
            "give the model's vocabulary size, or leave it out."
        )
    rules = mdp.Rules(
        max_prompt_length=max_prompt_length,
        max_new_tokens=max_new_tokens,
        vocab_size=size,
        eos_token_ids=token_ids(
            "eos_token_ids", tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids
        ),
        forbidden_token_ids=token_ids("forbidden_token_ids", forbidden_token_ids),
        min_new_tokens=min_new_tokens,
        max_turns=max_turns,
    )
    # Listed only now that the size is checked: a wrong one could take all the memory.
    has_no_text = np.ones(size, dtype=bool)
    has_no_text[list(tokenizer.ids)] = False
    without_text = np.flatnonzero(has_no_text).tolist()
    rules = replace(rules, forbidden_token_ids=(*rules.forbidden_token_ids, *without_text))
    if strings := texts("stop", stop):
        rules = replace(rules, stop=_stop_strings(strings, tokenizer, rules))
    if tokenizer.ids.isdisjoint(rules.eos_token_ids):
        raise UsageError(
            f"eos_token_ids holds {rules.eos_token_ids[0]}, which has no text in the tokenizer, so "
            "it can never be chosen; name an end-of-sequence id that the tokenizer has."
        )
    encoder = PromptEncoder(
        tokenizer,
        max_prompt_length,
        prompt_overflow,
        chat_template,
        system_prompt,
        chat_template_kwargs,
    )
    source, name = pocket.TRAIN_PROMPTS if prompts is None else prompts, "prompts"
    if named is not None and prompts is None:
        source, name = named.prompts, named.name
    dataset = load_prompts(source, encoder, name)
    if fits_longest:
        longest = max(len(prompt.ids) for prompt in dataset)
        rules = replace(rules, max_prompt_length=longest)
        encoder = replace(encoder, max_prompt_length=longest)
    partner = None
    if interaction is not None:
        partner = Partner(load_interaction(interaction), ReplyEncoder(encoder, rules))
    return TextTask(
        tokenizer=tokenizer,
        prompts=dataset,
        prompt_encoder=encoder,
        prompt_order=prompt_order,
        rules=rules,
        reward=load_reward(reward if named is None else named.reward),
        missing_eos_penalty=missing_eos_penalty,
        answer_of=None if named is None else named.answer_of,
        partner=partner,
    )


def _stop_strings(strings: tuple[str, ...], tokenizer: Tokenizer, rules: mdp.Rules) -> StopStrings:
    for token in special_tokens(tokenizer.backend).values():
        for string in strings:
            if token in string:
                raise UsageError(
                    f"stop holds {string!r}, but completions leave out the special token "
                    f"{token!r}; name its id in eos_token_ids instead."
                )
    return make_stop_strings(
        strings,
        token_bytes(tokenizer.backend),
        vocab_size=rules.vocab_size,
        usable_ids=tokenizer.ids.difference(rules.forbidden_token_ids, rules.eos_token_ids),
        max_new_tokens=rules.max_new_tokens,
    )


def takes_task_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Show the parameters of `make_task` where `init` takes `**task_arguments`, as in `help`."""
    own = [p for p in signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
    init.__signature__ = Signature([*own, *signature(make_task).parameters.values()])  # type: ignore[attr-defined]
    return init
