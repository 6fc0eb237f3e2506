"""What turns cost: in the compiled rollout, and in the vector environment.

python benchmarks/turns.py [--rows 32] [--turns 4] [--tokens 16] [--model FOLDER]
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import jax
import numpy as np
from flax import nnx

import qwen_env  # noqa: F401  (registers QwenText-v0)
from ppo_jax import cli, flags
from ppo_jax.config.fields import Checked, Count
from ppo_jax.generation.actor import Actor
from ppo_jax.models import load_pretrained
from ppo_jax.sampling import Sampling
from qwen_env import pocket
from qwen_env.interaction import Reply, TurnBatch
from qwen_env.rewards import RewardBatch
from qwen_env.task import make_task

ONLY = 5  # the id that may be chosen before a turn has all its tokens


@dataclass(frozen=True)
class Arguments(Checked):
    """Time a rollout of several turns, whose replies come at once, beside one response of as many
    tokens."""

    rows: Count = 32
    """Episodes in a rollout."""
    turns: Count = 4
    """Turns of an episode."""
    tokens: Count = 16
    """Tokens of each turn, and of each reply."""
    model: str = str(pocket.POLICY_FOLDER)
    """Hugging Face folder, hub id, or GGUF file."""


class AtOnce:
    """Replies with the same tokens to every turn."""

    def __init__(self, num_tokens: int):
        self._reply = Reply(ids=[ONLY] * num_tokens)

    def reply(self, batch: TurnBatch) -> list[Reply]:
        """At once."""
        return [self._reply] * len(batch)


def nothing(batch: RewardBatch) -> np.ndarray:
    """A reward that takes no time."""
    return np.zeros(len(batch))


def make_rollout(
    model: str, rows: int, turns: int, tokens: int, *, as_one: bool
) -> Callable[[int], float]:
    """From a seed to the seconds that a rollout takes.

    Args:
        tokens: of each turn, and of each reply.
        as_one: one response of as many tokens as the turns and the replies have together.
    """
    network = load_pretrained(model)
    vocab_size = network.config.vocab_size
    length = tokens * (2 * turns - 1)
    task = make_task(
        tokenizer=model,
        prompts=["The plot"] * rows,
        reward=nothing,
        vocab_size=vocab_size,
        max_prompt_length=8,
        max_new_tokens=length,
        eos_token_ids=[i for i in range(vocab_size) if i != ONLY],
        min_new_tokens=(length if as_one else tokens) - 1,
        **({} if as_one else {"interaction": AtOnce(tokens), "max_turns": turns}),
    )
    actor, params = Actor(network, task, Sampling()), nnx.state(network)

    def seconds(seed: int) -> float:
        start = time.perf_counter()
        done = actor.respond(params, list(task.prompts), jax.random.key(seed))
        jax.block_until_ready(done.rollout.logprobs)
        return time.perf_counter() - start

    return seconds


def steps_per_second(rows: int, tokens: int, *, interaction: AtOnce | None) -> float:
    """Token steps of `make_vec`, all rows together."""
    arguments = {} if interaction is None else {"interaction": interaction, "max_turns": 4}
    envs = gym.make_vec(
        "QwenText-v0", num_envs=rows, reward=nothing, max_new_tokens=8 * tokens, **arguments
    )
    envs.reset(seed=0)
    word = envs.unwrapped.task.tokenizer.encode(" film")[0]
    end = envs.unwrapped.task.rules.eos_token_ids[0]
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        for step in range(128):
            action = end if step % tokens == tokens - 1 else word
            envs.step(np.full(rows, action))
        best = max(best, 128 * rows / (time.process_time() - start))
    return best


def main() -> None:
    with cli.errors_as_sentences():
        measure(flags.parse(Arguments(), sys.argv[1:], prog="python benchmarks/turns.py"))


def measure(given: Arguments) -> None:
    """Print what the rollouts and the vector environments take."""
    sizes = given.model, given.rows, given.turns, given.tokens
    rollouts = [make_rollout(*sizes, as_one=as_one) for as_one in (True, False)]
    # They take turns, and the best one counts: what else the machine does only slows down.
    times = [[rollout(seed) for rollout in rollouts] for seed in range(12)]
    one, several = np.min(times[2:], axis=0)
    print(f"one response: {one:.3f} s; turns: {several:.3f} s; {several / one:.2f} times as long")
    for name, interaction in (("alone", None), ("with replies", AtOnce(given.tokens))):
        steps = steps_per_second(256, given.tokens, interaction=interaction)
        print(f"make_vec, 256 rows, {name}: {steps:,.0f} token steps/s")


if __name__ == "__main__":
    main()
