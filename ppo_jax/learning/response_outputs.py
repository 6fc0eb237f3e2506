"""Teacher forcing: what a network says of responses that are already written.

The old, the new and the reference policy all pass through here, so their log-probabilities can
differ only by their parameters. Only response positions reach the vocabulary projection.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ppo_jax.learning.logprobs import ChosenTokens, logprobs_and_entropy
from ppo_jax.learning.packing import Layout, pack
from ppo_jax.models.decoder import Decoder
from ppo_jax.models.heads import HistogramHead, PolicyValueNetwork, ValueHead
from ppo_jax.sampling import Sampling
from qwen_env import mdp


class ResponseOutputs(NamedTuple):
    """Response-aligned: index 0 belongs to the first response token."""

    logprobs: Float[Array, "B T"]  # of the tokens chosen, under the sampling distribution
    entropy: Float[Array, "B T"]  # of the sampling distribution
    values: Float[Array, "B T"] | None  # of the state before each token
    last_value: Float[Array, "B"] | None  # of the state after the last token
    value_logits: Float[Array, "B T bins"] | None = None  # of the bins that a value is the mean of


def response_outputs(
    network: PolicyValueNetwork,
    tokens: Int[Array, "B S"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    sampling_mask: UInt8[Array, "B T bytes"] | None = None,
    own: Bool[Array, "B T"] | None = None,
    *,
    rules: mdp.Rules,
    sampling: Sampling,
    with_values: bool = True,
    stop_value_gradient: bool = False,
    remat: bool = False,
    layout: Layout | None = None,
) -> ResponseOutputs:
    """Log-probabilities, entropies and values of responses. Beyond `length` they mean nothing.

    The hidden state at position p-1 predicts token p; values use the same shift.

    Args:
        sampling_mask: the ids that each token was drawn from, as `rollout` recorded them.
        own: the tokens that the policy chose; the others, replies, are only read, and what is said
            of them means nothing. None means all.
        with_values: compute values as well.
        stop_value_gradient: keep the gradient of the values out of the backbone.
        layout: rows that the sequences share; None leaves each in its own (`learning.packing`).
    """
    batch, num_steps = len(tokens), rules.max_new_tokens
    step = jnp.arange(num_steps)
    index = _response_index(tokens, prompt_length, num_steps)
    chosen = jnp.take_along_axis(tokens, index, axis=1)

    def hidden_states(backbone: Decoder) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
        return _hidden_states(backbone, tokens, index, length, remat=remat, layout=layout)

    hidden, last = hidden_states(network.backbone)
    values = last_value = value_logits = None
    if with_values:
        states = (hidden, last) if network.critic is None else hidden_states(network.critic)
        if stop_value_gradient:
            states = jax.lax.stop_gradient(states)
        values, last_value, value_logits = _values(network.value_head, *states)
    if own is None:
        own = step < (length - prompt_length)[:, None]
        number = jnp.broadcast_to(step, chosen.shape)
    else:
        number = numbers_in_turn(own)
    positions = hidden, ChosenTokens(chosen, number, sampling_mask), own
    hidden, chosen_tokens, is_response = jax.tree.map(
        lambda x: x.reshape(batch * num_steps, *x.shape[2:]), positions
    )
    logprobs, entropy = logprobs_and_entropy(
        hidden,
        network.backbone.unembedding,
        chosen_tokens,
        is_response,
        rules=rules,
        temperature=sampling.temperature,
    )
    return ResponseOutputs(
        logprobs.reshape(batch, num_steps),
        entropy.reshape(batch, num_steps),
        values,
        last_value,
        value_logits,
    )


class ResponseValues(NamedTuple):
    """As in `ResponseOutputs`."""

    values: Float[Array, "B T"]
    last_value: Float[Array, "B"]
    value_logits: Float[Array, "B T bins"] | None


def _values(
    head: ValueHead, hidden: Float[Array, "B T D"], last: Float[Array, "B D"]
) -> ResponseValues:
    logits = head.logits(hidden) if isinstance(head, HistogramHead) else None
    return ResponseValues(head(hidden), head(last), logits)


def response_values(
    network: PolicyValueNetwork,
    tokens: Int[Array, "B S"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    *,
    num_steps: int,
    remat: bool = False,
    layout: Layout | None = None,
) -> ResponseValues:
    """The values of `response_outputs` alone, without what the policy says.

    Where they are read off the policy's backbone, no gradient goes into it.

    Args:
        num_steps: T.
    """
    is_own = network.critic is not None
    states = _hidden_states(
        network.critic if network.critic is not None else network.backbone,
        tokens,
        _response_index(tokens, prompt_length, num_steps),
        length,
        remat=remat and is_own,
        layout=layout,
    )
    return _values(network.value_head, *(states if is_own else jax.lax.stop_gradient(states)))


def _response_index(
    tokens: Int[Array, "B S"], prompt_length: Int[Array, "B"], num_steps: int
) -> Int[Array, "B T"]:
    """Where each response token is in its row.

    Clipped, because a row that ends early may have fewer than T places after its prompt.
    """
    return jnp.minimum(prompt_length[:, None] + jnp.arange(num_steps), tokens.shape[1] - 1)


def _hidden_states(
    backbone: Decoder,
    tokens: Int[Array, "B S"],
    index: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    remat: bool,
    layout: Layout | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Before each response token, and at the end."""
    packed = pack(tokens, length, layout)
    before = packed.start[:, None] + jnp.minimum(index, length[:, None]) - 1
    hidden, _ = backbone(packed.tokens, packed.mask, remat=remat)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden[before], hidden[packed.start + length - 1]


def numbers_in_turn(own: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of each token in its turn, from 0."""
    step = jnp.broadcast_to(jnp.arange(own.shape[1]), own.shape)
    turn_start = jax.lax.cummax(jnp.where(own, 0, step + 1), axis=1)
    return jnp.where(own, step - turn_start, 0)
