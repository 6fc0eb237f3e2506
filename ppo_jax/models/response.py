"""Teacher forcing: what a network says of responses that are already written.

The old, the new and the reference policy all pass through here, so their log-probabilities can
differ only by their parameters. Only response positions reach the vocabulary projection, a chunk
of them at a time: with V = 151,936, the logits of a whole batch are what runs people out of memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.models.qwen2 import Qwen2
from ppo_jax.packing import Layout
from ppo_jax.sampling import Sampling, sampling_logits, unpacked
from qwen_env import mdp

LOGITS_AT_ONCE = 2**25
"""How many may exist at one time: so many (128 MiB) or, if those are more, D rows.

With fewer rows in a chunk, reading the projection and adding up its gradient takes longer than
the logits themselves.
"""

LEAST_CHUNK = 256
"""Positions that are not cut further: products of few rows are slow."""


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
    layout: Layout | None = None,
    num_chunks: int = 1,
) -> ResponseOutputs:
    """Log-probabilities, entropies and values of responses. Beyond `length` they mean nothing.

    The hidden state at position p-1 predicts token p; values use the same shift.

    Args:
        support: the ids that each token was drawn from, as `rollout` recorded them.
        num_steps: T, at least the longest response.
        stop_value_gradient: keep the gradient of the values out of the backbone.
        layout: rows that the sequences share; None leaves each in its own. See `ppo_jax.packing`.
        num_chunks: with several, project to the vocabulary in about so many parts and leave out
            those that no response reaches; it takes the memory of one more embedding table.
    """
    batch, width = tokens.shape
    packed = _packed(tokens, length, layout)
    step = jnp.arange(num_steps)
    # Clipped, because a row that ends early may have fewer than T places behind its prompt.
    index = jnp.minimum(prompt_length[:, None] + step, width - 1)
    chosen = jnp.take_along_axis(tokens, index, axis=1)
    before = packed.start[:, None] + jnp.minimum(index, length[:, None]) - 1

    def hidden_states(backbone: Qwen2) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
        """Before each response token, and at the end."""
        hidden, _ = backbone(packed.tokens, packed.mask, remat=remat)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return hidden[before], hidden[packed.start + length - 1]

    hidden, last = hidden_states(network.backbone)
    value_hidden, last = (hidden, last) if network.critic is None else hidden_states(network.critic)
    if stop_value_gradient:
        value_hidden, last = jax.lax.stop_gradient((value_hidden, last))
    positions = _Positions(hidden, chosen, jnp.broadcast_to(step, chosen.shape), support)
    logprobs, entropy = _logprobs_and_entropy(
        network,
        jax.tree.map(lambda x: x.reshape(batch * num_steps, *x.shape[2:]), positions),
        (step < (length - prompt_length)[:, None]).reshape(-1),
        num_chunks,
        rules,
        sampling,
    )
    return ResponseOutputs(
        logprobs.reshape(batch, num_steps),
        entropy.reshape(batch, num_steps),
        network.value_head(value_hidden),
        network.value_head(last),
    )


class _Packed(NamedTuple):
    """Sequences as the backbone reads them."""

    tokens: Int[Array, "rows S"]
    mask: Int[Array, "rows S"]
    start: Int[Array, "B"]  # of each sequence, in the flattened rows


def _packed(tokens: Int[Array, "B S"], length: Int[Array, "B"], layout: Layout | None) -> _Packed:
    count, width = tokens.shape
    step = jnp.arange(width)
    is_real = step < length[:, None]
    if layout is None:
        return _Packed(tokens, is_real.astype(jnp.int32), width * jnp.arange(count))
    num_rows, places = layout
    start = width * places.row + places.start
    size = num_rows * width
    place = jnp.where(is_real, start[:, None] + step, size)  # of padding, behind the end: dropped
    number = jnp.broadcast_to(1 + jnp.arange(count)[:, None], place.shape)

    def laid_out(x: Int[Array, "B S"]) -> Int[Array, "rows S"]:
        return jnp.zeros(size, x.dtype).at[place].set(x, mode="drop").reshape(num_rows, width)

    return _Packed(laid_out(tokens), laid_out(number), start)


class _Positions(NamedTuple):
    """What the distribution of a token is made of; N or B x T lead."""

    hidden: Float[Array, "N D"]
    chosen: Int[Array, "N"]
    step: Int[Array, "N"]
    support: UInt8[Array, "N V/8"] | None


def _logprobs_and_entropy(
    network: PolicyValueNetwork,
    positions: _Positions,
    is_response: Bool[Array, "N"],
    num_chunks: int,
    rules: mdp.Rules,
    sampling: Sampling,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """log p(chosen) and H(p), by chunks of rows: see LOGITS_AT_ONCE."""

    def of_chunk(rows: _Positions) -> tuple[Array, Array]:
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

    count, skips = is_response.shape[0], num_chunks > 1
    most = max(LOGITS_AT_ONCE // rules.vocab_size, network.config.hidden_size)
    num_chunks = max(-(-count // most), min(num_chunks, count // LEAST_CHUNK), 1)
    if num_chunks == 1:  # the logits are kept for the backward pass
        return jax.checkpoint(
            of_chunk, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable
        )(positions)

    chunk = -(-count // num_chunks)
    order = jnp.argsort(~is_response)  # stable: responses first
    # Behind the end, edge values: a row of zeros would be a token that was drawn from no ids.
    taken = order[jnp.minimum(jnp.arange(num_chunks * chunk), count - 1)]
    chunks = jax.tree.map(lambda x: x[taken].reshape(num_chunks, chunk, *x.shape[1:]), positions)

    def of_numbered(number: Int[Array, ""], positions: _Positions) -> tuple[Array, Array]:
        if not skips:
            return of_chunk(positions)
        is_reached = number * chunk < is_response.sum()
        nothing = jnp.zeros(chunk), jnp.zeros(chunk)
        return jax.lax.cond(is_reached, of_chunk, lambda _: nothing, positions)

    of_numbered = jax.checkpoint(of_numbered, prevent_cse=False)
    results = jax.lax.map(lambda x: of_numbered(*x), (jnp.arange(num_chunks), chunks))
    logprobs, entropy = (jnp.zeros(count).at[order].set(x.reshape(-1)[:count]) for x in results)
    return logprobs, entropy
