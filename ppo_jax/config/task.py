"""Which model answers what, and what its answers are worth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ppo_jax.config.fields import Checked, Count, Factor, Natural, Share
from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.prompts import Overflow


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which model, and how it is written to."""

    model: str = str(pocket.POLICY_FOLDER)
    """The model: a folder in Hugging Face layout, a hub id, or a .gguf file."""
    chat: bool = False
    """Wrap each prompt in the tokenizer's chat template, as a user's message."""
    system_prompt: str | None = None
    """System message for every chat that has none of its own."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the chat template, each a name and a JSON value, such as enable_thinking=false,
    with which Qwen3 answers at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.template_arguments  # refuses what is none

    @property
    def template_arguments(self) -> dict[str, Any]:
        """`chat_template_kwargs` by name."""
        arguments: dict[str, Any] = {}
        for given in self.chat_template_kwargs:
            name, is_given, value = given.partition("=")
            try:
                arguments[name] = json.loads(value)
            except ValueError:
                is_given = ""
            if not is_given or not name.isidentifier():
                raise UsageError(
                    f"chat_template_kwargs has {given!r}; it must be a name and a JSON value, such "
                    "as enable_thinking=false or language='\"English\"'."
                )
        return arguments


@dataclass(frozen=True)
class ResponseConfig(ModelConfig):
    """Which model answers, and how it is asked."""

    max_new_tokens: Count = pocket.MAX_NEW_TOKENS
    """Longest response, in tokens."""
    min_new_tokens: Natural = 0
    """Forbid the end-of-sequence token before a response has this many tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a response as soon as it contains one of them, such as "</answer>"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens "
                f"({self.max_new_tokens}); lower it."
            )


@dataclass(frozen=True)
class TaskConfig(ResponseConfig):
    """What the model is asked, and what its answers are worth."""

    task: str | None = None
    """A task by name, which brings prompts, held-out prompts, and the reward that verifies the
    answers: "gsm8k", "gsm8k:FOLDER_OR_FILE", "reasoning_gym:NAME" with options as in
    "reasoning_gym:chain_sum?min_terms=3&size=2000", "textarena:GAME", "guess_the_number",
    "calculator", or "package.module:callable"."""
    prompts: str | None = str(pocket.TRAIN_PROMPTS)
    """Prompts to train on: a .jsonl file whose objects hold "prompt" (text) or "messages" (a
    chat)."""
    eval_prompts: str | None = str(pocket.HELDOUT_PROMPTS)
    """Held-out prompts (.jsonl); None sets the last tenth of the training prompts aside."""
    reward: str | None = f"flax:{pocket.REWARD_FOLDER}"
    """Reward function: "package.module:callable", "hf:MODEL" (run by transformers), "flax:FOLDER"
    (a Qwen2, Qwen3 or Llama reward model, run on the device), "http://..." (a reward server), or a
    weighted sum, "1.0 * a.b:c + 0.5 * d.e:f"."""
    gold_reward: str | None = None
    """A second reward, reported beside the first and never trained on."""
    interaction: str | None = None
    """What replies between the policy's turns: "package.module:name", a function of a TurnBatch or
    an object with a method reply; None leaves it to the task."""
    max_turns: Count | None = None
    """Most turns of an episode, whose replies count towards max_new_tokens; None leaves it to the
    task, or makes it 1."""
    max_prompt_length: Count | None = pocket.MAX_PROMPT_LENGTH
    """Longest prompt, in tokens; None makes it that of the longest prompt there is."""
    prompt_overflow: Overflow = "error"
    """What to do with a longer prompt: refuse it, drop it, or cut off its beginning."""
    missing_eos_penalty: Factor = 0.0
    """Subtract this from the score of a response that the length limit cut off."""
    keep_solvable: tuple[Share, Share] | None = None
    """Train only on prompts of which the untrained model answers a share within these two limits
    right, such as 0.1 0.9. It is measured once, before training, by the reward's accuracy."""

    replaces: ClassVar[Mapping[str, Sequence[str]]] = {
        "task": ("prompts", "eval_prompts", "reward", "gold_reward", "max_prompt_length"),
        "prompts": ("task",),
    }
    """What a flag makes None unless it is given too: what the preset says of another task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_solvable is not None and self.keep_solvable[0] > self.keep_solvable[1]:
            low, high = self.keep_solvable
            raise UsageError(
                f"keep_solvable is {low} {high}; the first limit must not be above the second."
            )
        if self.task is None:
            return
        for name in self.replaces["task"]:  # the defaults are the pocket task's
            if getattr(self, name) == getattr(type(self), name):
                object.__setattr__(self, name, None)
        for name in ("prompts", "reward"):
            if (value := getattr(self, name)) is not None:
                raise UsageError(
                    f"task is {self.task!r}, which brings prompts and a reward of its own, but "
                    f"{name} is {value!r}; leave one of the two out, or give both prompts and "
                    "reward in the task's place."
                )
