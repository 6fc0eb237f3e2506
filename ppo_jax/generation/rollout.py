"""Sampling inside the MDP, compiled: one prefill, then a token a step for all rows at once.

The transition is `qwen_env.mdp.step`, the same lines that drive the Gymnasium environment. The
loop stops as soon as every row has ended; it may go on in fewer and fewer rows as they do.

Shapes: B batch, P prompt limit, T response limit, S = P + T, V vocabulary, D hidden.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt8

from ppo_jax.models.attention import KeyValue
from ppo_jax.models.decoder import DecoderLayer, last_hidden
from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.models.rope import rotary_angles
from ppo_jax.sampling import Sampling, pack_bits, sampling_logits, truncation
from qwen_env import mdp


class Rollout(NamedTuple):
    """B finished episodes."""

    state: mdp.State
    logprobs: Float[Array, "B T"]  # of the tokens as they were drawn; 0 beyond the response
    sampling_mask: UInt8[Array, "B T V/8"] | None = None  # what they were drawn from, if truncated


class _Carry(NamedTuple):
    step: Int[Array, ""]  # response tokens written to every running row
    key: Key[Array, "B"]  # each row draws from its own
    token: Int[Array, "B"]  # the last of them
    state: mdp.State
    cache: tuple[KeyValue, ...]
    logprobs: Float[Array, "B T"]
    sampling_mask: UInt8[Array, "B T V/8"] | None


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
) -> Rollout:
    """Write `completions_per_prompt` responses to every prompt, in rows that follow each other.

    Tokens are drawn from the sampling distribution over the allowed ids, or are the most probable
    ones if `greedy`; `logprobs` are under that same distribution either way. The prompts of B rows
    are read once for all their completions.

    Row r draws its token number t with fold_in(fold_in(key, r), t), so what it writes depends on no
    other row: not on how many there are, nor on which device or in which place they lie.

    Args:
        prompt_number: of each prompt in the whole batch, of which this may be a part: row
            `completions_per_prompt` · number + c writes completion c. None counts from 0.
        compacts_rows: go on in fewer and fewer rows as responses end. Saves time where they are
            ragged, and takes longer to compile.
    """

    def choose(hidden: Array, carry: _Carry) -> _Carry:
        """Draw token number `carry.step` of the response from its predecessor's hidden state."""
        has_ended = mdp.has_ended(carry.state)
        token, logprob, sampling_mask = choose_token(
            network,
            hidden,
            mdp.response_length(carry.state),
            jax.vmap(jax.random.fold_in, (0, None))(carry.key, carry.step),
            rules=rules,
            sampling=sampling,
            greedy=greedy,
        )
        logprob = jnp.where(has_ended, 0.0, logprob)
        sampling_masks = carry.sampling_mask
        if sampling_masks is not None and sampling_mask is not None:
            sampling_mask = jnp.where(has_ended[:, None], _EVERYTHING, pack_bits(sampling_mask))
            sampling_masks = _written(sampling_masks, sampling_mask, carry.step)
        return carry._replace(
            step=carry.step + 1,
            token=token,
            state=mdp.step(carry.state, token, rules, jnp),
            logprobs=_written(carry.logprobs, logprob, carry.step),
            sampling_mask=sampling_masks,
        )

    def advance(carry: _Carry) -> _Carry:
        hidden, cache = _decode(network, layers, carry, rules)
        return choose(hidden, carry._replace(cache=cache))

    def finish(carry: _Carry, until: int, *fewer: int) -> Rollout:
        """A token a step until `until` rows have not ended, then in those alone, and so on to 0."""
        carry = jax.lax.while_loop(
            lambda carry: (~mdp.has_ended(carry.state)).sum() > until, advance, carry
        )
        result = Rollout(carry.state, carry.logprobs, carry.sampling_mask)
        if until == 0:
            return result
        rows = jnp.argsort(mdp.has_ended(carry.state))[:until]  # those that go on come first
        rest = finish(jax.tree.map(lambda x: x[rows] if x.ndim else x, carry), *fewer)
        whole: Rollout = jax.tree.map(lambda all, some: all.at[rows].set(some), result, rest)
        return whole

    def several(x: Array) -> Array:
        return jnp.repeat(x, completions_per_prompt, axis=0)

    prompts = mdp.initial_state(prompt_ids, prompt_length, rules, jnp)
    hidden, cache, state = jax.tree.map(several, (*_prefill(network, prompts, rules), prompts))
    network = _in_compute_type(network)
    layers = network.backbone.unstacked_layers()
    shape = state.length.shape[0], rules.max_new_tokens
    if prompt_number is None:
        prompt_number = jnp.arange(prompts.length.shape[0])
    row = completions_per_prompt * prompt_number[:, None] + jnp.arange(completions_per_prompt)
    start = _Carry(
        step=jnp.zeros((), jnp.int32),
        key=jax.vmap(jax.random.fold_in, (None, 0))(key, row.reshape(-1)),
        token=jnp.zeros_like(state.length),
        state=state,
        cache=cache,
        logprobs=jnp.zeros(shape, jnp.float32),
        sampling_mask=jnp.full((*shape, -(-rules.vocab_size // 8)), _EVERYTHING)
        if sampling.is_truncated
        else None,
    )
    fewer = {int(share * shape[0]) for share in _SHARES if compacts_rows} | {0}
    return finish(choose(hidden, start), *sorted(fewer, reverse=True))


_SHARES = 3 / 4, 1 / 2, 1 / 4, 1 / 8
"""Of the rows, in which a rollout goes on once no more have not ended."""


def _in_compute_type(network: PolicyValueNetwork) -> PolicyValueNetwork:
    """The backbone's parameters as each use would cast them, so that no token has to wait for it.

    XLA:GPU moves nothing out of a loop: there, every step would read all float32 parameters.
    """
    graphdef, params = nnx.split(network)
    dtype = network.backbone.dtype
    backbone = jax.tree.map(lambda x: x.astype(dtype), params["backbone"])
    return nnx.merge(graphdef, nnx.State({**params, "backbone": backbone}))


_EVERYTHING = np.uint8(255)  # eight ids that may all be drawn


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
    token = argmax(logits + noise)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1), sampling_mask


def argmax(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The first place of each row's greatest number.

    As two reductions: XLA:CPU computes `jnp.argmax`, and the noise that it fuses into it, a number
    at a time, which took a tenth of the time of generation for 32 rows.
    """
    count = x.shape[-1]
    is_greatest = x == x.max(axis=-1, keepdims=True)
    first = jnp.where(is_greatest, jnp.arange(count, dtype=jnp.int32), count).min(axis=-1)
    return jnp.minimum(first, count - 1)  # of a row with NaN, some place


def _written(x: Array, column: Array, step: Array) -> Array:
    """`x` [B, T, ...] with `column` [B, ...] in place `step`."""
    return jax.lax.dynamic_update_slice_in_dim(x, column[:, None], step, axis=1)


def _prefill(
    network: PolicyValueNetwork, state: mdp.State, rules: mdp.Rules
) -> tuple[Float[Array, "B D"], tuple[KeyValue, ...]]:
    """The hidden state of each prompt's last token, and caches with room for the responses.

    A cache has S slots: the prompt in the first P, response token t in slot P + t for every row,
    so that a decode step writes one slot and not one a row. Angles use true positions.
    """
    prompts = state.tokens[:, : rules.max_prompt_length]
    mask = mdp.attention_mask(state, jnp)[:, : rules.max_prompt_length]
    hidden, stacked = network.backbone(prompts, mask)
    room = [(0, 0), (0, 0), (0, rules.max_new_tokens), (0, 0)]
    cache = tuple(
        KeyValue(jnp.pad(stacked.key[i], room), jnp.pad(stacked.value[i], room))
        for i in range(network.config.num_hidden_layers)
    )
    return last_hidden(hidden, state.prompt_length), cache


def _decode(
    network: PolicyValueNetwork, layers: list[DecoderLayer], carry: _Carry, rules: mdp.Rules
) -> tuple[Float[Array, "B D"], tuple[KeyValue, ...]]:
    """The hidden state of the token just written, and caches that hold it."""
    index = carry.step - 1
    rotary = rotary_angles((carry.state.prompt_length + index)[:, None], network.config)
    slots = jnp.arange(rules.max_length)
    is_prompt = slots < carry.state.prompt_length[:, None]
    is_response = (slots >= rules.max_prompt_length) & (slots <= rules.max_prompt_length + index)
    mask = (is_prompt | is_response)[:, None, :]
    x = network.backbone.embed(carry.token)[:, None]
    cache = []
    for layer, past in zip(layers, carry.cache, strict=True):
        x, key_value = layer(x, rotary, mask, past, rules.max_prompt_length + index)
        cache.append(key_value)
    return network.backbone.norm(x)[:, 0], tuple(cache)
