"""Teacher forcing: what a network says of responses that are already written.

The old, the new and the reference policy all pass through here, so their log-probabilities can
differ only by their parameters. Only response positions reach the vocabulary projection, a chunk
of them at a time: with V = 151,936, the logits of a whole batch are what runs people out of memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.heads import PolicyValueNetwork
from qwen_env import mdp

CHUNK_SIZE = 128
"""Positions whose logits exist at one time: enough rows for a matrix product at full speed."""


class ResponseOutputs(NamedTuple):
    """Response-aligned: index 0 belongs to the first response token."""

    logprobs: Float[Array, "B T"]  # of the tokens chosen, under the sampling distribution
    entropy: Float[Array, "B T"]  # of the sampling distribution
    values: Float[Array, "B T"]  # of the state before each token


def response_outputs(
    network: PolicyValueNetwork,
    tokens: Int[Array, "B S"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    *,
    rules: mdp.Rules,
    temperature: float,
    remat: bool = False,
) -> ResponseOutputs:
    """Log-probabilities, entropies and values of responses. Beyond `length` they mean nothing.

    The hidden state at position p-1 predicts token p; values use the same shift.
    """
    attention_mask = jnp.arange(tokens.shape[1]) < length[:, None]
    hidden, _ = network.backbone(tokens, attention_mask, remat=remat)
    step = jnp.arange(rules.max_new_tokens)
    index = prompt_length[:, None] + step
    chosen = jnp.take_along_axis(tokens, index, axis=1)
    hidden = jnp.take_along_axis(hidden, index[..., None] - 1, axis=1)
    batch, steps, size = hidden.shape
    logprobs, entropy = _logprobs_and_entropy(
        network,
        hidden.reshape(batch * steps, size),
        chosen.reshape(batch * steps),
        jnp.broadcast_to(step, (batch, steps)).reshape(batch * steps),
        rules,
        temperature,
    )
    return ResponseOutputs(
        logprobs.reshape(batch, steps), entropy.reshape(batch, steps), network.value_head(hidden)
    )


def sampling_logits(
    logits: Float[Array, "N V"], allowed: Bool[Array, "N V"], temperature: float
) -> Float[Array, "N V"]:
    """The logits that tokens are drawn from: tempered, forbidden ids at -inf. In float32."""
    return jnp.where(allowed, logits.astype(jnp.float32) / temperature, -jnp.inf)


def _logprobs_and_entropy(
    network: PolicyValueNetwork,
    hidden: Float[Array, "N D"],
    chosen: Int[Array, "N"],
    step: Int[Array, "N"],
    rules: mdp.Rules,
    temperature: float,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """log p(chosen) and H(p), CHUNK_SIZE rows at a time; the backward pass recomputes logits."""

    def of_chunk(rows: Any) -> tuple[Array, Array]:
        hidden, chosen, step = rows
        allowed = mdp.action_mask(step, rules, jnp)
        logits = sampling_logits(network.logits(hidden), allowed, temperature)
        log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        # 0 log 0 = 0; the inner where keeps -inf out of the gradient.
        p_log_p = jnp.where(allowed, jnp.exp(log_p) * jnp.where(allowed, log_p, 0.0), 0.0)
        logprob = jnp.take_along_axis(log_p, chosen[:, None], axis=-1)[:, 0]
        return logprob, -p_log_p.sum(axis=-1)

    count = hidden.shape[0]
    num_chunks = -(-count // CHUNK_SIZE)
    chunk = -(-count // num_chunks)

    def in_chunks(x: Array) -> Array:
        padded = jnp.pad(x, [(0, num_chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(num_chunks, chunk, *x.shape[1:])

    rows = jax.tree.map(in_chunks, (hidden, chosen, step))
    logprobs, entropy = jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), rows)
    return logprobs.reshape(-1)[:count], entropy.reshape(-1)[:count]
