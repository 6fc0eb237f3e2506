"""What the network does in a rollout: it reads tokens into caches, and chooses the next one.

A cache has S slots a row. With one turn, all rows write the same slot at each step, which is faster
than one a row: prompts lie in the first P, and what follows goes around the other T, whenever a row
began. With several turns, the slot of a token is its position. Angles use true positions.

Shapes: B batch, P prompt limit, T response limit, S = P + T, Q tokens read at once, V vocabulary,
D hidden.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from ppo_jax.models.attention import KeyValue, Sequences, sequences
from ppo_jax.models.decoder import DecoderLayer, last_hidden
from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.models.rope import rotary_angles
from ppo_jax.sampling import Sampling, greatest, sampling_logits, truncation
from qwen_env import mdp


def in_compute_type(network: PolicyValueNetwork) -> PolicyValueNetwork:
    """The backbone's parameters as each use would cast them, so that no token has to wait for it.

    XLA:GPU moves nothing out of a loop: there, every step would read all float32 parameters.
    """
    graphdef, params = nnx.split(network)
    dtype = network.backbone.dtype
    backbone = jax.tree.map(lambda x: x.astype(dtype), params["backbone"])
    return nnx.merge(graphdef, nnx.State({**params, "backbone": backbone}))


def choose_token(
    network: PolicyValueNetwork,
    hidden: Float[Array, "B D"],
    num_written: Int[Array, "B"],
    key: Key[Array, "B"],
    *,
    rules: mdp.Rules,
    sampling: Sampling,
    greedy: bool,
) -> tuple[Int[Array, "B"], Float[Array, "B"], Bool[Array, "B V"] | None]:
    """The token that follows each hidden state, the response being `num_written` tokens long.

    Args:
        key: one for each draw.

    Returns:
        tokens, their log-probabilities, and the ids they were drawn from if those are truncated.
    """
    allowed = mdp.action_mask(num_written, rules, jnp)
    logits = sampling_logits(network.logits(hidden), allowed, sampling.temperature)
    sampling_mask = None
    if sampling.is_truncated:
        sampling_mask = truncation(logits, sampling)
        logits = jnp.where(sampling_mask, logits, -jnp.inf)
    # The greatest of logits plus Gumbel noise is a draw from their softmax.
    noise = 0.0 if greedy else jax.vmap(partial(jax.random.gumbel, shape=logits.shape[1:]))(key)
    token, logprob = greatest(logits, noise)
    return token, logprob, sampling_mask


def prefill(
    network: PolicyValueNetwork, state: mdp.State, rules: mdp.Rules
) -> tuple[Float[Array, "B D"], tuple[KeyValue, ...]]:
    """The hidden state of each prompt's last token, and caches of S slots that hold the prompts in
    the first P."""
    prompts = state.tokens[:, : rules.max_prompt_length]
    hidden, stacked = network.backbone(prompts, state.prompt_length)
    room = [(0, 0), (0, 0), (0, rules.max_new_tokens), (0, 0)]
    cache = tuple(
        KeyValue(jnp.pad(stacked.key[i], room), jnp.pad(stacked.value[i], room))
        for i in range(network.config.num_hidden_layers)
    )
    return last_hidden(hidden, state.prompt_length), cache


def prefill_in_loop(
    network: PolicyValueNetwork, layers: list[DecoderLayer], state: mdp.State, rules: mdp.Rules
) -> tuple[Float[Array, "B D"], tuple[KeyValue, ...]]:
    """The same from the layers apart, which are whole on every device, so that none waits for
    another; caches of P slots."""
    prompts = state.tokens[:, : rules.max_prompt_length]
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    seen = sequences(state.prompt_length, prompts.shape[1])
    hidden, cache = _read(network, layers, prompts, positions, seen)
    return last_hidden(hidden, state.prompt_length), cache


def decode(
    network: PolicyValueNetwork,
    layers: list[DecoderLayer],
    state: mdp.State,
    cache: tuple[KeyValue, ...],
    step: Int[Array, ""],
    rules: mdp.Rules,
    num_read: int,
) -> tuple[Float[Array, "B D"], tuple[KeyValue, ...]]:
    """The hidden state of each row's last token, and caches that hold it.

    Rows that have stopped read their last token again.

    Args:
        step: the decode steps so far. With one turn, this one's tokens go to slot P + step mod T.
        num_read: how many of the S slots are read, from the first on; see `num_slots_in_use`.
    """
    position = (state.length - 1)[:, None]
    token = jnp.take_along_axis(state.tokens, position, axis=1)
    if rules.max_turns > 1:
        slot, mask = position[:, 0], jnp.arange(rules.max_length) <= position
    else:
        slot = rules.max_prompt_length + step % rules.max_new_tokens
        age = (step - jnp.arange(rules.max_new_tokens)) % rules.max_new_tokens
        is_prompt = jnp.arange(rules.max_prompt_length) < state.prompt_length[:, None]
        is_response = age < mdp.response_length(state)[:, None]
        mask = jnp.concatenate([is_prompt, is_response], axis=1)
    seen = mask[:, None, :num_read]
    hidden, cache = _read(network, layers, token, position, seen, cache, slot)
    return hidden[:, 0], cache


def num_slots_in_use(state: mdp.State, step: Int[Array, ""], rules: mdp.Rules) -> Int[Array, ""]:
    """How many slots `decode` must read at least."""
    longest: Array = state.length.max()
    if rules.max_turns > 1:
        return longest
    return rules.max_prompt_length + jnp.minimum(step + 1, rules.max_new_tokens)


_READ_AT_ONCE = 32
"""Tokens of each reply: with fewer, weights are read more often; with more, more is padding."""


def read_on(
    network: PolicyValueNetwork,
    layers: list[DecoderLayer],
    state: mdp.State,
    start: Int[Array, "B"],
    cache: tuple[KeyValue, ...],
) -> tuple[Float[Array, "B D"], tuple[KeyValue, ...]]:
    """Read the tokens of each row from `start` to its end, in caches whose slots are positions.

    What lies in a cache beyond a row's end is never seen: it is written over first.

    Returns:
        the hidden state of each row's last token, and the caches.
    """
    width = state.tokens.shape[1]

    def read_some(
        carry: tuple[Array, Array, tuple[KeyValue, ...]],
    ) -> tuple[Array, Array, tuple[KeyValue, ...]]:
        begin, hidden, cache = carry
        positions = begin[:, None] + jnp.arange(_READ_AT_ONCE)
        tokens = jnp.take_along_axis(state.tokens, jnp.minimum(positions, width - 1), axis=1)
        mask = jnp.arange(width) <= positions[:, :, None]
        some, cache = _read(network, layers, tokens, positions, mask, cache, begin)
        place = state.length - begin  # from 1
        last = last_hidden(some, jnp.clip(place, 1, _READ_AT_ONCE))
        is_here = (place >= 1) & (place <= _READ_AT_ONCE)
        return begin + _READ_AT_ONCE, jnp.where(is_here[:, None], last, hidden), cache

    nothing = jnp.zeros((len(start), network.config.hidden_size), network.backbone.dtype)
    _, hidden, cache = jax.lax.while_loop(
        lambda carry: (carry[0] < state.length).any(), read_some, (start, nothing, cache)
    )
    return hidden, cache


def _read(
    network: PolicyValueNetwork,
    layers: list[DecoderLayer],
    tokens: Int[Array, "B Q"],
    positions: Int[Array, "B Q"],
    seen: Bool[Array, "B Q S"] | Sequences,
    cache: tuple[KeyValue, ...] | None = None,
    slot: Int[Array, ""] | Int[Array, "B"] | int = 0,
) -> tuple[Float[Array, "B Q D"], tuple[KeyValue, ...]]:
    """Hidden states of tokens that follow what the caches hold, if anything, and caches that hold
    them from `slot` on."""
    rotary = rotary_angles(positions, network.config)
    x = network.backbone.embed(tokens)
    longer = []
    for layer, past in zip(layers, cache or [None] * len(layers), strict=True):
        x, key_value = layer(x, rotary, seen, past, slot)
        longer.append(key_value)
    return network.backbone.norm(x), tuple(longer)
