"""Teacher forcing: what a network says of responses that are already written.

The old, the new and the reference policy all pass through here, so their log-probabilities can
differ only by their parameters. Only response positions reach the vocabulary projection, a chunk
of them at a time: with V = 151,936, the logits of a whole batch are what runs people out of memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.sampling import Sampling, sampling_logits, unpacked
from qwen_env import mdp

LOGITS_AT_ONCE = 2**25
"""How many may exist at one time (128 MiB): rows enough for a matrix product at full speed."""


class ResponseOutputs(NamedTuple):
    """Response-aligned: index 0 belongs to the first response token."""

    logprobs: Float[Array, "B T"]  # of the tokens chosen, under the sampling distribution
    entropy: Float[Array, "B T"]  # of the sampling distribution
    values: Float[Array, "B T"]  # of the state before each token
    last_value: Float[Array, "B"]  # of the state behind the last token


def response_outputs(
    network: PolicyValueNetwork,
    tokens: Int[Array, "B S"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    support: UInt8[Array, "B T V/8"] | None = None,
    *,
    rules: mdp.Rules,
    sampling: Sampling,
    num_steps: int,
    stop_value_gradient: bool = False,
    remat: bool = False,
) -> ResponseOutputs:
    """Log-probabilities, entropies and values of responses. Beyond `length` they mean nothing.

    The hidden state at position p-1 predicts token p; values use the same shift.

    Args:
        support: the ids that each token was drawn from, as `rollout` recorded them.
        num_steps: T, at least the longest response.
        stop_value_gradient: keep the gradient of the values out of the backbone.
    """
    attention_mask = jnp.arange(tokens.shape[1]) < length[:, None]
    hidden, _ = network.backbone(tokens, attention_mask, remat=remat)
    step = jnp.arange(num_steps)
    # Clipped, because a row that ends early may have fewer than T places behind its prompt.
    index = jnp.minimum(prompt_length[:, None] + step, tokens.shape[1] - 1)
    chosen = jnp.take_along_axis(tokens, index, axis=1)

    def before_each_token(hidden: Float[Array, "B S D"]) -> Float[Array, "B T D"]:
        return jnp.take_along_axis(hidden, index[..., None] - 1, axis=1)

    if network.critic is not None:
        value_hidden, _ = network.critic(tokens, attention_mask, remat=remat)
    else:
        value_hidden = jax.lax.stop_gradient(hidden) if stop_value_gradient else hidden
    last = jnp.take_along_axis(value_hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    hidden = before_each_token(hidden)
    batch, steps, size = hidden.shape
    logprobs, entropy = _logprobs_and_entropy(
        network,
        hidden.reshape(batch * steps, size),
        chosen.reshape(batch * steps),
        jnp.broadcast_to(step, (batch, steps)).reshape(batch * steps),
        None if support is None else support.reshape(batch * steps, -1),
        rules,
        sampling,
    )
    return ResponseOutputs(
        logprobs.reshape(batch, steps),
        entropy.reshape(batch, steps),
        network.value_head(before_each_token(value_hidden)),
        network.value_head(last),
    )


def _logprobs_and_entropy(
    network: PolicyValueNetwork,
    hidden: Float[Array, "N D"],
    chosen: Int[Array, "N"],
    step: Int[Array, "N"],
    support: UInt8[Array, "N V/8"] | None,
    rules: mdp.Rules,
    sampling: Sampling,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """log p(chosen) and H(p), by chunks of rows whose logits are LOGITS_AT_ONCE at most."""

    def of_chunk(rows: Any) -> tuple[Array, Array]:
        hidden, chosen, step, support = rows
        allowed = mdp.action_mask(step, rules, jnp)
        if support is not None:
            allowed &= unpacked(support, rules.vocab_size)
        logits = sampling_logits(network.logits(hidden), allowed, sampling.temperature)
        log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        # 0 log 0 = 0; the inner where keeps -inf out of the gradient.
        p_log_p = jnp.where(allowed, jnp.exp(log_p) * jnp.where(allowed, log_p, 0.0), 0.0)
        logprob = jnp.take_along_axis(log_p, chosen[:, None], axis=-1)[:, 0]
        return logprob, -p_log_p.sum(axis=-1)

    count = hidden.shape[0]
    num_chunks = -(-count // max(LOGITS_AT_ONCE // rules.vocab_size, 1))
    chunk = -(-count // num_chunks)

    def in_chunks(x: Array) -> Array:
        # Edge values, because a row of zeros would be a token that was drawn from no ids.
        extra = [(0, num_chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, extra, mode="edge").reshape(num_chunks, chunk, *x.shape[1:])

    rows = jax.tree.map(in_chunks, (hidden, chosen, step, support))
    # The logits of a single chunk are kept for the backward pass, those of several recomputed.
    policy = jax.checkpoint_policies.dots_saveable if num_chunks == 1 else None
    of_chunk = jax.checkpoint(of_chunk, prevent_cse=False, policy=policy)
    logprobs, entropy = jax.lax.map(of_chunk, rows)
    return logprobs.reshape(-1)[:count], entropy.reshape(-1)[:count]
