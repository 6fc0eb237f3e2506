"""A closer look at a few episodes: each token's log-probability, and what else was likely.

Shapes: K of B episodes, T response limit, A alternatives, V vocabulary, D hidden.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ppo_jax.learning.logprobs import LOGITS_AT_ONCE
from ppo_jax.learning.response_outputs import numbers_in_turn
from ppo_jax.models.decoder import project
from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.sampling import Sampling, sampling_logits, unpack_bits
from qwen_env import mdp

NUM_ALTERNATIVES = 5


class Look(NamedTuple):
    """Of each token of a response, under the distribution that it is drawn from."""

    logprobs: Float[Array, "K T"]
    alternatives: Int[Array, "K T A"]  # the most probable ids, the most probable first
    alternative_logprobs: Float[Array, "K T A"]  # -inf of ids that cannot be drawn


def look(
    network_of: Callable[[Any], PolicyValueNetwork],
    params: Any,
    rows: Int[Array, "K"],
    state: mdp.State,
    sampling_mask: UInt8[Array, "B T bytes"] | None,
    *,
    rules: mdp.Rules,
    sampling: Sampling,
) -> Look:
    """What a policy says of some of B responses, which are already written. Of what it did not
    choose, and beyond the end, it means nothing.

    The logits of a few positions exist at a time.

    Args:
        network_of: the network with given parameters.
        rows: those that are looked at.
        state: in which the B responses ended.
        sampling_mask: the ids that each token was drawn from, as `rollout` recorded them.
    """
    network = network_of(params)
    state, sampling_mask = jax.tree.map(lambda x: x[rows], (state, sampling_mask))
    step = jnp.arange(rules.max_new_tokens)
    index = jnp.minimum(state.prompt_length[:, None] + step, state.tokens.shape[1] - 1)
    before = jnp.minimum(index, state.length[:, None]) - 1
    hidden = network.backbone(state.tokens, mdp.attention_mask(state, jnp))[0]
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    chosen = jnp.take_along_axis(state.tokens, index, axis=1)
    number = numbers_in_turn(mdp.response_mask(state, rules.max_new_tokens, jnp))
    projection = network.backbone.unembedding.astype(hidden.dtype)

    def of_chunk(positions: Any) -> Look:
        hidden, chosen, number, sampling_mask = positions
        allowed = mdp.action_mask(number, rules, jnp)
        if sampling_mask is not None:
            allowed &= unpack_bits(sampling_mask, rules.vocab_size)
        logits = sampling_logits(project(hidden, projection), allowed, sampling.temperature)
        logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        best, ids = jax.lax.top_k(logprobs, min(NUM_ALTERNATIVES, rules.vocab_size))
        return Look(jnp.take_along_axis(logprobs, chosen[:, None], axis=-1)[:, 0], ids, best)

    count = chosen.size
    chunk = min(max(LOGITS_AT_ONCE // rules.vocab_size, 1), count)
    num_chunks = -(-count // chunk)
    place = jnp.minimum(jnp.arange(num_chunks * chunk), count - 1)  # beyond the end, the last one
    positions = hidden, chosen, number, sampling_mask
    chunks = jax.tree.map(
        lambda x: x.reshape(count, *x.shape[2:])[place].reshape(num_chunks, chunk, *x.shape[2:]),
        positions,
    )
    result: Look = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*chosen.shape, *x.shape[2:]),
        jax.lax.map(of_chunk, chunks),
    )
    return result
