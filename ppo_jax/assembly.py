"""From settings to what they name: tokenizer, prompts, reward, network and task.

The one place where a task is put together, for every command and for Python.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ppo_jax.config import TaskConfig
from ppo_jax.generation.reward_models import load_training_reward
from ppo_jax.models import PolicyValueNetwork, load_pretrained
from qwen_env.errors import UsageError
from qwen_env.prompts import PromptDataset, PromptEncoder, load_prompts
from qwen_env.task import TextTask, make_task
from qwen_env.tokenizer import load_tokenizer

_ANY_LENGTH = 2**31 - 1


class Assembly(NamedTuple):
    """A network and the task that it is to do."""

    network: PolicyValueNetwork
    task: TextTask
    held_out: PromptDataset | None  # None where the prompts were given, not named by settings


def assemble(
    settings: TaskConfig,
    *,
    prompts: Any = None,
    reward: Any = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    say: Callable[[str], object] = lambda message: None,
) -> Assembly:
    """Load what `settings` name, the network last, since it takes longest.

    Args:
        prompts: instead of those that `settings` name: whatever the environment takes as prompts.
        reward: instead of the one that `settings` name: a function of a `RewardBatch`, or the name
            of one.
        dtype: the type that the network computes in.
        param_dtype: the type that its parameters are kept in.
        say: is told how many prompts were dropped, if any were.

    Raises:
        UsageError: a setting, or a file that it names, is wrong.
        gymnasium.error.DependencyNotInstalled: an optional package is missing.
    """
    reward = settings.reward if reward is None else reward
    if prompts is None and settings.prompts is None:
        raise UsageError("There are no prompts; name them, such as --prompts my_prompts.jsonl.")
    if reward is None:
        raise UsageError("There is no reward; name one, such as --reward my_rewards:my_function.")
    tokenizer = load_tokenizer(settings.model)
    encoder = PromptEncoder(
        tokenizer,
        settings.max_prompt_length or _ANY_LENGTH,
        overflow=settings.prompt_overflow,
        chat_template=True if settings.chat else None,
        system_prompt=settings.system_prompt,
    )

    def read(source: Any) -> PromptDataset:
        dataset = load_prompts(source, encoder)
        if dropped := dataset.num_dropped:
            name = source if isinstance(source, str) else "the prompts"
            say(
                f"Dropped {dropped} of {dropped + len(dataset)} prompts of {name}: more than "
                f"{settings.max_prompt_length} tokens."
            )
        return dataset

    held_out: PromptDataset | None = None
    if prompts is not None:
        prompts = read(prompts)
    elif settings.eval_prompts is not None:
        prompts, held_out = read(settings.prompts), read(settings.eval_prompts)
    else:
        prompts, held_out = _set_apart(read(settings.prompts), str(settings.prompts))
    reward = load_training_reward(reward, tokenizer, settings.gold_reward)
    network = load_pretrained(settings.model, dtype=dtype, param_dtype=param_dtype)
    longest = max(len(prompt.ids) for dataset in (prompts, held_out or ()) for prompt in dataset)
    task = make_task(
        tokenizer=tokenizer,
        prompts=prompts,
        reward=reward,
        max_prompt_length=settings.max_prompt_length or longest,
        max_new_tokens=settings.max_new_tokens,
        vocab_size=network.config.vocab_size,
        min_new_tokens=settings.min_new_tokens,
        stop=settings.stop,
        chat_template=encoder.chat_template,
        system_prompt=settings.system_prompt,
        prompt_overflow=settings.prompt_overflow,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    return Assembly(network, task, held_out)


def _set_apart(prompts: PromptDataset, name: str) -> tuple[PromptDataset, PromptDataset]:
    """All but the last tenth of `prompts`, and that tenth."""
    if len(prompts) < 2:
        raise UsageError(
            f"{name} holds one prompt, so none can be set aside for evaluation; add prompts, or "
            "name others with --eval-prompts."
        )
    num_held_out = max(len(prompts) // 10, 1)
    return prompts[:-num_held_out], prompts[-num_held_out:]
