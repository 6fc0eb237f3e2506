"""From settings to what they name: tokenizer, prompts, reward, network and task.

The one place where a task is put together, for every command and for Python.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from jax.sharding import Mesh

from ppo_jax.config import TaskConfig, TrainConfig
from ppo_jax.generation.reward_models import load_training_reward
from ppo_jax.models import (
    PolicyValueNetwork,
    load_critic,
    load_pretrained,
    with_separate_critic,
)
from ppo_jax.models.loading import model_in, read_max_length, tokenizer_place
from qwen_env.errors import UsageError
from qwen_env.hub import resolve
from qwen_env.prompts import PromptDataset, PromptEncoder, load_prompts
from qwen_env.task import TextTask, make_task
from qwen_env.tasks import NamedTask, has_one_turn, load_named_task
from qwen_env.tokenizer import Tokenizer, load_tokenizer


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
    mesh: Mesh | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> Assembly:
    """Load what `settings` name, the network last, since it takes longest.

    Args:
        prompts: instead of those that `settings` or their task name: whatever the environment takes
            as prompts.
        reward: instead of the one that `settings` or their task name: a function of a
            `RewardBatch`, or the name of one. A task's interaction stays its own.
        dtype: the type that the network computes in.
        param_dtype: the type that its parameters are kept in.
        mesh: that they are cut over.
        say: is told how many prompts were dropped, if any were.

    Raises:
        UsageError: a setting, or a file that it names, is wrong.
        gymnasium.error.DependencyNotInstalled: an optional package is missing.
    """
    both_given = prompts is not None and reward is not None
    named: NamedTask | None = None
    if settings.task is not None and not (both_given and has_one_turn(settings.task)):
        named = load_named_task(settings.task)
    if prompts is None and named is None and settings.prompts is None:
        raise UsageError(
            "There are no prompts; name them, such as --prompts my_prompts.jsonl, or a task."
        )
    if reward is None:
        reward = settings.reward if named is None else named.reward
    if reward is None:
        raise UsageError(
            "There is no reward; name one, such as --reward my_rewards:my_function, or a task."
        )
    tokenizer = load_tokenizer(tokenizer_place(settings.model))
    encoder = PromptEncoder(
        tokenizer,
        # No prompt can be longer, so that no line is tokenised to its end in vain.
        settings.max_prompt_length or read_max_length(settings.model),
        overflow=settings.prompt_overflow,
        chat_template=True if settings.chat else None,
        system_prompt=settings.system_prompt,
        chat_template_kwargs=settings.template_arguments,
    )

    def read(source: Any, name: str) -> PromptDataset:
        dataset = load_prompts(source, encoder, name)
        if dropped := dataset.num_dropped:
            say(
                f"Dropped {dropped} of {dropped + len(dataset)} prompts of {name}: more than "
                f"{encoder.max_prompt_length} tokens."
            )
        return dataset

    held_out: PromptDataset | None = None
    if prompts is not None:
        prompts = read(prompts, prompts if isinstance(prompts, str) else "prompts")
    else:
        name = str(settings.prompts) if named is None else named.name
        prompts = read(settings.prompts if named is None else named.prompts, name)
        if settings.eval_prompts is not None:
            held_out = read(settings.eval_prompts, settings.eval_prompts)
        elif named is not None and named.held_out is not None:
            held_out = read(named.held_out, f"{name} (held out)")
        else:
            prompts, held_out = _set_apart(prompts, name)
    reward = load_training_reward(reward, tokenizer, settings.gold_reward)
    network = load_pretrained(settings.model, dtype=dtype, param_dtype=param_dtype, mesh=mesh)
    longest = max(len(prompt.ids) for dataset in (prompts, held_out or ()) for prompt in dataset)
    as_named = NamedTask("", prompts, held_out, reward) if named is None else named
    task = make_task(
        tokenizer=tokenizer,
        task=replace(as_named, reward=reward),
        prompts=prompts,
        max_prompt_length=settings.max_prompt_length or longest,
        max_new_tokens=settings.max_new_tokens,
        vocab_size=network.config.vocab_size,
        min_new_tokens=settings.min_new_tokens,
        stop=settings.stop,
        chat_template=encoder.chat_template,
        system_prompt=settings.system_prompt,
        chat_template_kwargs=settings.template_arguments,
        prompt_overflow=settings.prompt_overflow,
        missing_eos_penalty=settings.missing_eos_penalty,
        interaction=settings.interaction,
        max_turns=settings.max_turns,
    )
    return Assembly(network, task, held_out)


def with_critic_model(
    network: PolicyValueNetwork,
    config: TrainConfig,
    tokenizer: Tokenizer,
    mesh: Mesh | None = None,
) -> PolicyValueNetwork:
    """The network, its critic the one that `critic_model` names; itself where it names none.

    Args:
        tokenizer: the policy's.
        mesh: that the critic's parameters are cut over.

    Raises:
        UsageError: there is no such model, or it reads other tokens, or is of another size.
    """
    if config.ppo.critic_model is None:
        return network
    name, run = model_in(config.ppo.critic_model), config.run
    place = tokenizer_place(name)
    has_own = (resolve(place, allow_patterns=["tokenizer*.json"]) / "tokenizer.json").exists()
    if has_own and load_tokenizer(place).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UsageError(
            f"critic_model is {name!r}, which reads other tokens than the policy writes; take one "
            "with the policy's tokenizer."
        )
    critic = load_critic(name, dtype=run.dtype, param_dtype=run.param_dtype, mesh=mesh)
    try:
        return with_separate_critic(network, critic)
    except UsageError as error:
        raise UsageError(f"critic_model is {name!r}, which does not fit: {error}") from error


def _set_apart(prompts: PromptDataset, name: str) -> tuple[PromptDataset, PromptDataset]:
    """All but the last tenth of `prompts`, and that tenth."""
    if len(prompts) < 2:
        raise UsageError(
            f"{name} holds one prompt, so none can be set aside for evaluation; add prompts, or "
            "name others with --eval-prompts."
        )
    num_held_out = max(len(prompts) // 10, 1)
    return prompts[:-num_held_out], prompts[-num_held_out:]
