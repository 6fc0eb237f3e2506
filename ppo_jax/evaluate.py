"""Score a model: `python -m ppo_jax.evaluate --model FOLDER --prompts FILE --reward SPEC`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from ppo_jax import cli
from ppo_jax.config.ranges import (
    Count,
    Factor,
    Natural,
    Probability,
    Seed,
    Temperature,
    check_ranges,
)
from ppo_jax.generation.actor import Actor
from ppo_jax.generation.episode_metrics import evaluation_means
from ppo_jax.generation.reward_models import load_training_reward
from ppo_jax.models import load_pretrained
from ppo_jax.runs.progress import stderr_console
from ppo_jax.sampling import Sampling
from qwen_env import pocket
from qwen_env.prompts import Overflow, PromptEncoder, load_prompts
from qwen_env.task import make_task
from qwen_env.tokenizer import load_tokenizer

PROG = "python -m ppo_jax.evaluate"


@dataclass(frozen=True)
class Arguments:
    """Score a Qwen2's completions of prompts, both greedy and sampled."""

    model: str = str(pocket.POLICY_FOLDER)
    """A folder in Hugging Face layout, a .gguf file, or a hub id."""
    prompts: str = str(pocket.HELDOUT_PROMPTS)
    """Prompts: a .jsonl file whose objects hold "prompt" (text) or "messages" (a chat)."""
    reward: str = f"flax:{pocket.REWARD_FOLDER}"
    """Reward: "package.module:callable", "hf:MODEL", "flax:FOLDER", or a weighted sum."""
    gold_reward: str | None = None
    """A second reward, reported beside the first."""
    max_prompt_length: Count | None = None
    """P, the prompt limit, in tokens; None takes prompts of any length."""
    max_new_tokens: Count = pocket.MAX_NEW_TOKENS
    """T, the response limit, in tokens."""
    min_new_tokens: Natural = 0
    """No end-of-sequence token before this many tokens."""
    prompt_overflow: Overflow = "error"
    """What to do with a prompt over the limit."""
    chat: bool = False
    """Wrap each prompt in the model's chat template, as a user's message."""
    system_prompt: str | None = None
    """System message of every chat that has none of its own."""
    missing_eos_penalty: Factor = 0.0
    """Taken off the score of a response that the limit cut off."""
    temperature: Temperature = 1.0
    """Of the sampled pass."""
    top_k: Count | None = None
    """Sample from the k most probable tokens alone."""
    top_p: Probability | None = None
    """Sample from the fewest most probable tokens that have this probability together."""
    batch_size: Count = 16
    """Prompts decoded at a time."""
    seed: Seed = 0
    """Of the sampled pass."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments = cli.parse(Arguments, sys.argv[1:] if argv is None else argv, prog=PROG)
        cli.keep_compiled_programs()
        cli.find_devices()
        passes = evaluate(arguments)
        if arguments.json:
            print(json.dumps(passes))
            return
        table = Table("", *passes, box=box.SIMPLE_HEAD)
        for name in passes["greedy"]:
            table.add_row(name, *(f"{means[name]:.4f}" for means in passes.values()))
        Console().print(table)


def evaluate(arguments: Arguments) -> dict[str, dict[str, float]]:
    """Means of the greedy and the sampled pass; see `episode_metrics.evaluation_means`.

    Raises:
        UsageError: an argument, the model, the prompts or the reward is wrong.
    """
    check_ranges(arguments)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    cli.refuse_run_folder(arguments.model)
    limit = sys.maxsize if arguments.max_prompt_length is None else arguments.max_prompt_length
    tokenizer = load_tokenizer(arguments.model)
    encoder = PromptEncoder(
        tokenizer,
        limit,
        overflow=arguments.prompt_overflow,
        chat_template=True if arguments.chat else None,
        system_prompt=arguments.system_prompt,
    )
    prompts = load_prompts(arguments.prompts, encoder)
    cli.say_dropped(prompts, arguments.prompts, limit)
    reward = load_training_reward(arguments.reward, tokenizer, arguments.gold_reward)
    network = load_pretrained(arguments.model)
    task = make_task(
        tokenizer=tokenizer,
        prompts=prompts,
        reward=reward,
        max_prompt_length=max(len(prompt.ids) for prompt in prompts),
        max_new_tokens=arguments.max_new_tokens,
        vocab_size=network.config.vocab_size,
        min_new_tokens=arguments.min_new_tokens,
        missing_eos_penalty=arguments.missing_eos_penalty,
    )
    actor = Actor(network, task, sampling)

    def means(decoding: str) -> dict[str, float]:
        bar = progress.add_task(decoding, total=len(prompts))
        _, outcomes = actor.respond_to_all(
            nnx.state(network),
            prompts,
            jax.random.key(arguments.seed),
            batch_size=arguments.batch_size,
            greedy=decoding == "greedy",
            on_batch=lambda done: progress.update(bar, completed=done),
        )
        return evaluation_means(outcomes)

    console = stderr_console()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_interactive
    ) as progress:
        return {decoding: means(decoding) for decoding in ("greedy", "sampled")}


if __name__ == "__main__":
    main()
