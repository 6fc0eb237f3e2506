"""A closer look at a few episodes: each token's log-probability, and what else was likely.

Shapes: K of B episodes, T response limit, A alternatives, V vocabulary, D hidden.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ppo_jax.learning.logprobs import LOGITS_AT_ONCE
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
    tokens: Int[Array, "B S"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    sampling_mask: UInt8[Array, "B T bytes"] | None,
    *,
    rules: mdp.Rules,
    sampling: Sampling,
) -> Look:
    """What a policy says of some of B responses, which are already written. Beyond `length` it
    means nothing.

    The logits of a few positions exist at a time.

    Args:
        network_of: the network with given parameters.
        rows: those that are looked at.
        sampling_mask: the ids that each token was drawn from, as `rollout` recorded them.
    """
    network = network_of(params)
    tokens, prompt_length, length, sampling_mask = jax.tree.map(
        lambda x: x[rows], (tokens, prompt_length, length, sampling_mask)
    )
    width = tokens.shape[1]
    mask = jnp.arange(width) < length[:, None]
    step = jnp.arange(rules.max_new_tokens)
    index = jnp.minimum(prompt_length[:, None] + step, width - 1)
    before = jnp.minimum(index, length[:, None]) - 1
    hidden = jnp.take_along_axis(network.backbone(tokens, mask)[0], before[..., None], axis=1)
    chosen = jnp.take_along_axis(tokens, index, axis=1)
    projection = network.backbone.unembedding.astype(hidden.dtype)

    def of_chunk(positions: Any) -> Look:
        hidden, chosen, step, sampling_mask = positions
        allowed = mdp.action_mask(step, rules, jnp)
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
    positions = hidden, chosen, jnp.broadcast_to(step, chosen.shape), sampling_mask
    chunks = jax.tree.map(
        lambda x: x.reshape(count, *x.shape[2:])[place].reshape(num_chunks, chunk, *x.shape[2:]),
        positions,
    )
    result: Look = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*chosen.shape, *x.shape[2:]),
        jax.lax.map(of_chunk, chunks),
    )
    return result
