"""Sampling inside the MDP, compiled: one prefill, then a token a step for all rows at once.

The transitions are `qwen_env.mdp.step` and `qwen_env.mdp.reply`, the same lines that drive the
Gymnasium environment. The loop stops as soon as no row is running: each has ended or, where there
are several turns, waits for a reply, behind which `resume` goes on.

Shapes: B batch, P prompt limit, T response limit, S = P + T, R width of replies, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt8

from ppo_jax.generation.decoding import prefill, read_on
from ppo_jax.generation.slots import Draws, Slots, Writer, Writing, each
from ppo_jax.models.attention import KeyValue
from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.sampling import Sampling
from qwen_env import mdp


class Rollout(NamedTuple):
    """B episodes."""

    state: mdp.State
    logprobs: Float[Array, "B T"]  # of the tokens as they were drawn; 0 where none was
    sampling_mask: UInt8[Array, "B T V/8"] | None = None  # what they were drawn from, if truncated


class Pause(NamedTuple):
    """Where no row is running."""

    rollout: Rollout
    key: Key[Array, "B"]  # each row draws from its own
    cache: tuple[KeyValue, ...]  # none where there is one turn, since nothing goes on


def rollout(
    network: PolicyValueNetwork,
    prompt_ids: Int[Array, "prompts P"],
    prompt_length: Int[Array, "prompts"],
    key: PRNGKeyArray,
    *,
    rules: mdp.Rules,
    sampling: Sampling = Sampling(),  # noqa: B008  (immutable)
    prompt_number: Int[Array, "prompts"] | None = None,
    completions_per_prompt: int = 1,
    greedy: bool = False,
    compacts_rows: bool = False,
    num_slots: int | None = None,
    bounds_reads: bool = False,
) -> Rollout:
    """The whole of episodes that have one turn; see `begin` and `Writing` for the arguments."""
    writing = Writing(rules, sampling, greedy, compacts_rows, num_slots, bounds_reads)
    numbers = jnp.arange(prompt_ids.shape[0]) if prompt_number is None else prompt_number
    keys = row_keys(key, numbers, completions_per_prompt)
    return begin(network, prompt_ids, prompt_length, keys, writing).rollout


def row_keys(
    key: PRNGKeyArray, prompt_number: Int[Array, "prompts"], completions_per_prompt: int
) -> Key[Array, "B"]:
    """A key for each row, of which the rows of a prompt follow each other.

    Row r draws its token number t with fold_in(fold_in(key, r), t), so what it writes depends on no
    other row: not on how many there are, nor on which device, in which place or when they lie.

    Args:
        prompt_number: of each prompt in the whole batch, of which these may be a part: row
            `completions_per_prompt` · number + c writes completion c.
    """
    row = completions_per_prompt * prompt_number[:, None] + jnp.arange(completions_per_prompt)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row.reshape(-1))


def begin(
    network: PolicyValueNetwork,
    prompt_ids: Int[Array, "prompts P"],
    prompt_length: Int[Array, "prompts"],
    keys: Key[Array, "B"],
    writing: Writing,
) -> Pause:
    """Write the first turn of `B / prompts` responses to every prompt, in rows that follow each
    other; `logprobs` are under the distribution that tokens are drawn from.

    The prompts of B rows are read once for all their completions; with fewer slots than rows, once
    for those that take their places together.
    """
    num_rows, num_slots = len(keys), writing.num_slots
    prompts = mdp.initial_state(prompt_ids, prompt_length, writing.rules, jnp)
    states = each(prompts, num_rows)
    draws = Draws.none(num_rows, writing)
    writer = Writer.of(network, writing)
    if num_slots is not None and num_slots < num_rows:
        states, draws = writer.write_in_turn(prompts, states, keys, draws)
        return Pause(Rollout(states, *draws), keys, ())
    hidden, cache = each(prefill(network, prompts, writing.rules), num_rows)
    slots = Slots(jnp.arange(num_rows), keys, states, cache)
    return _pause(*writer.write(hidden, slots, draws))


def resume(
    network: PolicyValueNetwork,
    pause: Pause,
    reply_ids: Int[Array, "B R"],
    reply_length: Int[Array, "B"],
    done: Bool[Array, "B"],
    writing: Writing,
) -> Pause:
    """Read the replies into the caches, and write the next turn of every row that goes on.

    For the replies see `qwen_env.mdp.reply`.
    """
    before = pause.rollout.state
    state = mdp.reply(before, reply_ids, reply_length, done, writing.rules, jnp)
    writer = Writer.of(network, writing)
    # The last token of a turn was drawn, but nothing has read it: it is read first.
    hidden, cache = read_on(writer.network, writer.layers, state, before.length - 1, pause.cache)
    slots = Slots(jnp.arange(len(done)), pause.key, state, cache)
    return _pause(*writer.write(hidden, slots, Draws(*pause.rollout[1:])))


def _pause(slots: Slots, draws: Draws) -> Pause:
    return Pause(Rollout(slots.state, *draws), slots.key, slots.cache)
