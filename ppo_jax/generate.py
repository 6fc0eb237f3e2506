"""Talk to a model: `python -m ppo_jax.generate --model runs/pocket/final "The plot was"`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import numpy as np
import tyro
from flax import nnx

from ppo_jax import cli
from ppo_jax.config.ranges import Count, Natural, Probability, Seed, Temperature, check_ranges
from ppo_jax.generation.actor import Actor
from ppo_jax.models import load_pretrained
from ppo_jax.sampling import Sampling
from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.prompts import PromptEncoder, load_prompts
from qwen_env.rewards import RewardBatch
from qwen_env.task import make_task
from qwen_env.tokenizer import load_tokenizer

PROG = "python -m ppo_jax.generate"


@dataclass(frozen=True)
class Arguments:
    """Complete prompts with a Qwen2."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")]
    """What to complete."""
    model: str = str(pocket.POLICY_FOLDER)
    """A folder in Hugging Face layout, a .gguf file, or a hub id."""
    max_new_tokens: Count = 64
    """Response limit, in tokens."""
    min_new_tokens: Natural = 0
    """No end-of-sequence token before this many tokens."""
    greedy: bool = False
    """Always take the most probable token."""
    temperature: Temperature | None = None
    """Of sampling; by default 1."""
    top_k: Count | None = None
    """Sample from the k most probable tokens alone."""
    top_p: Probability | None = None
    """Sample from the fewest most probable tokens that have this probability together."""
    seed: Seed = 0
    """Of sampling."""
    chat: bool = False
    """Wrap each prompt in the model's chat template, as a user's message."""
    system_prompt: str | None = None
    """System message of every chat."""
    json: bool = False
    """Print one object per line: prompt, completion, finish_reason."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments = cli.parse(Arguments, sys.argv[1:] if argv is None else argv, prog=PROG)
        cli.keep_compiled_programs()
        cli.find_devices()
        for record in generate(arguments):
            if arguments.json:
                print(json.dumps(record, ensure_ascii=False))
            elif arguments.chat:
                print(record["completion"])
            else:
                print(record["prompt"] + record["completion"])


def generate(arguments: Arguments) -> list[dict[str, str]]:
    """One record per prompt: `prompt`, `completion`, `finish_reason`.

    Raises:
        UsageError: an argument or the model is wrong.
    """
    check_ranges(arguments)
    if arguments.system_prompt is not None and not arguments.chat:
        raise UsageError(
            "system_prompt is set, but only a chat has a system message; add --chat, or drop it."
        )
    sampling = _sampling(arguments)
    cli.refuse_run_folder(arguments.model)
    if not arguments.prompts:
        raise UsageError(f"There is no prompt; give one or more: {PROG} --model FOLDER 'The plot'.")
    tokenizer = load_tokenizer(arguments.model)
    encoder = PromptEncoder(
        tokenizer,
        sys.maxsize,
        chat_template=True if arguments.chat else None,
        system_prompt=arguments.system_prompt,
    )
    prompts = load_prompts(arguments.prompts, encoder)
    longest = max(len(prompt.ids) for prompt in prompts)
    network = load_pretrained(arguments.model)
    if longest + arguments.max_new_tokens > network.config.max_position_embeddings:
        raise UsageError(
            f"The longest prompt has {longest} tokens; with max_new_tokens "
            f"({arguments.max_new_tokens}) that is more than the model's "
            f"{network.config.max_position_embeddings} positions; lower max_new_tokens, or "
            "shorten the prompt."
        )
    task = make_task(
        tokenizer=tokenizer,
        prompts=prompts,
        reward=_nothing,
        max_prompt_length=longest,
        max_new_tokens=arguments.max_new_tokens,
        vocab_size=network.config.vocab_size,
        min_new_tokens=arguments.min_new_tokens,
    )
    done = Actor(network, task, sampling).respond(
        nnx.state(network), prompts, jax.random.key(arguments.seed), greedy=arguments.greedy
    )
    return [
        {
            "prompt": prompt,
            "completion": outcome.info["completion"],
            "finish_reason": outcome.info["finish_reason"],
        }
        for prompt, outcome in zip(arguments.prompts, done.outcomes, strict=True)
    ]


def _sampling(arguments: Arguments) -> Sampling:
    given = {name: getattr(arguments, name) for name in Sampling._fields}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.greedy and given:
        raise UsageError(
            f"greedy and {next(iter(given))} exclude each other; leave one of them out."
        )
    return Sampling(**given)


def _nothing(batch: RewardBatch) -> np.ndarray:
    return np.zeros(len(batch), np.float32)


if __name__ == "__main__":
    main()
