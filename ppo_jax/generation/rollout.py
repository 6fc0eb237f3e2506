"""Sampling inside the MDP, compiled: one prefill, then a token a step for all rows at once.

The transitions are `qwen_env.mdp.step` and `qwen_env.mdp.reply`, the same lines that drive the
Gymnasium environment. The loop stops as soon as no row is running: each has ended or, where there
are several turns, waits for a reply, behind which `resume` goes on. As rows stop, the loop may go
on in fewer and fewer.

Shapes: B batch, P prompt limit, T response limit, S = P + T, R width of replies, V vocabulary,
D hidden.
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
from ppo_jax.sampling import Sampling, greatest, pack_bits, sampling_logits, truncation
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


class Writing(NamedTuple):
    """How responses are written; constants.

    Tokens are drawn from the sampling distribution over the allowed ids, or are the most probable
    ones if `greedy`. With `compacts_rows` the loop goes on in fewer and fewer rows as they stop,
    which saves time where responses are ragged, and takes longer to compile.
    """

    rules: mdp.Rules
    sampling: Sampling = Sampling()
    greedy: bool = False
    compacts_rows: bool = False


class _Carry(NamedTuple):
    step: Int[Array, ""]  # tokens written to every row that is running since the loop began
    key: Key[Array, "B"]
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
    """The whole of episodes that have one turn; see `begin` and `Writing` for the arguments."""
    writing = Writing(rules, sampling, greedy, compacts_rows)
    numbers = jnp.arange(prompt_ids.shape[0]) if prompt_number is None else prompt_number
    keys = row_keys(key, numbers, completions_per_prompt)
    return begin(network, prompt_ids, prompt_length, keys, writing).rollout


def row_keys(
    key: PRNGKeyArray, prompt_number: Int[Array, "prompts"], completions_per_prompt: int
) -> Key[Array, "B"]:
    """A key for each row, of which the rows of a prompt follow each other.

    Row r draws its token number t with fold_in(fold_in(key, r), t), so what it writes depends on no
    other row: not on how many there are, nor on which device or in which place they lie.

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

    The prompts of B rows are read once for all their completions.
    """
    rules, num_rows = writing.rules, keys.shape[0]
    prompts = mdp.initial_state(prompt_ids, prompt_length, rules, jnp)
    hidden, cache, state = jax.tree.map(
        lambda x: jnp.repeat(x, num_rows // prompts.length.shape[0], axis=0),
        (*_prefill(network, prompts, rules), prompts),
    )
    shape = num_rows, rules.max_new_tokens
    sampling_mask = None
    if writing.sampling.is_truncated:
        sampling_mask = jnp.full((*shape, -(-rules.vocab_size // 8)), _EVERYTHING)
    nothing = Rollout(state, jnp.zeros(shape, jnp.float32), sampling_mask)
    network = _in_compute_type(network)
    layers = network.backbone.unstacked_layers()
    return _write_turn(network, layers, hidden, Pause(nothing, keys, cache), writing)


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
    network = _in_compute_type(network)
    layers = network.backbone.unstacked_layers()
    # The last token of a turn was drawn, but nothing has read it: it is read first.
    hidden, cache = _read_on(network, layers, state, before.length - 1, pause.cache)
    pause = Pause(pause.rollout._replace(state=state), pause.key, cache)
    return _write_turn(network, layers, hidden, pause, writing)


def _write_turn(
    network: PolicyValueNetwork,
    layers: list[DecoderLayer],
    hidden: Float[Array, "B D"],
    pause: Pause,
    writing: Writing,
) -> Pause:
    """From the hidden states of the last tokens: a token a step, until no row is running."""
    rules, num_rows = writing.rules, pause.key.shape[0]

    def choose(hidden: Array, carry: _Carry) -> _Carry:
        """Draw each row's next token from the hidden state of its last."""
        state = carry.state
        running = mdp.is_running(state)
        number = mdp.response_length(state)
        token, logprob, sampling_mask = choose_token(
            network,
            hidden,
            mdp.turn_length(state),
            jax.vmap(jax.random.fold_in)(carry.key, number),
            rules=rules,
            sampling=writing.sampling,
            greedy=writing.greedy,
        )
        place = carry.step  # one for all, where those that run are in step
        if rules.max_turns > 1:
            place = jnp.where(running, number, rules.max_new_tokens)
        sampling_masks = carry.sampling_mask
        if sampling_masks is not None and sampling_mask is not None:
            sampling_mask = jnp.where(running[:, None], pack_bits(sampling_mask), _EVERYTHING)
            sampling_masks = _written(sampling_masks, sampling_mask, place)
        return carry._replace(
            step=carry.step + 1,
            state=mdp.step(state, token, rules, jnp),
            logprobs=_written(carry.logprobs, jnp.where(running, logprob, 0.0), place),
            sampling_mask=sampling_masks,
        )

    def advance(carry: _Carry) -> _Carry:
        hidden, cache = _decode(network, layers, carry, rules)
        return choose(hidden, carry._replace(cache=cache))

    def finish(carry: _Carry, until: int, *fewer: int) -> _Carry:
        """A token a step until `until` rows are running, then in those alone, and so on to 0."""
        carry = jax.lax.while_loop(
            lambda carry: mdp.is_running(carry.state).sum() > until, advance, carry
        )
        if until == 0:
            return carry if rules.max_turns > 1 else carry._replace(cache=())
        rows = jnp.argsort(~mdp.is_running(carry.state))[:until]  # those that go on come first
        rest = finish(jax.tree.map(lambda x: x[rows] if x.ndim else x, carry), *fewer)
        if rules.max_turns == 1:
            carry = carry._replace(cache=())
        whole: _Carry = jax.tree.map(
            lambda all, some: all.at[rows].set(some) if all.ndim else some, carry, rest
        )
        return whole

    state, logprobs, sampling_mask = pause.rollout
    start = _Carry(jnp.zeros((), jnp.int32), pause.key, state, pause.cache, logprobs, sampling_mask)
    fewer = {int(share * num_rows) for share in _SHARES if writing.compacts_rows} | {0}
    end = finish(choose(hidden, start), *sorted(fewer, reverse=True))
    return Pause(Rollout(end.state, end.logprobs, end.sampling_mask), end.key, end.cache)


_SHARES = 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16
"""Of the rows, in which a rollout goes on once no more are running."""


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
    token, logprob = greatest(logits, noise)
    return token, logprob, sampling_mask


def _written(x: Array, column: Array, place: Array) -> Array:
    """`x` [B, T, ...] with `column` [B, ...] in `place`: one for all rows, or one a row, of which
    T is none."""
    if place.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(x, column[:, None], place, axis=1)
    return x.at[jnp.arange(x.shape[0]), place].set(column, mode="drop")


def _prefill(
    network: PolicyValueNetwork, state: mdp.State, rules: mdp.Rules
) -> tuple[Float[Array, "B D"], tuple[KeyValue, ...]]:
    """The hidden state of each prompt's last token, and caches of S slots that hold the prompts in
    the first P."""
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
    """The hidden state of each row's last token, and caches that hold it.

    With one turn, those that run are in step: response token t goes to slot P + t of every row, so
    that a decode step writes one slot and not one a row. Angles use true positions. With several,
    the slot is the position. Rows that have stopped read their last token again.
    """
    state, slots = carry.state, jnp.arange(rules.max_length)
    position = (state.length - 1)[:, None]
    token = jnp.take_along_axis(state.tokens, position, axis=1)
    if rules.max_turns > 1:
        slot, mask = position[:, 0], slots <= position
    else:
        slot = rules.max_prompt_length + carry.step - 1
        is_prompt = slots < state.prompt_length[:, None]
        mask = is_prompt | ((slots >= rules.max_prompt_length) & (slots <= slot))
    hidden, cache = _read(network, layers, token, position, mask[:, None], carry.cache, slot)
    return hidden[:, 0], cache


_READ_AT_ONCE = 32
"""Tokens of each reply: with fewer, weights are read more often; with more, more is padding."""


def _read_on(
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
    mask: Bool[Array, "B Q S"],
    cache: tuple[KeyValue, ...],
    slot: Int[Array, ""] | Int[Array, "B"],
) -> tuple[Float[Array, "B Q D"], tuple[KeyValue, ...]]:
    """Hidden states of tokens that follow what the caches hold, and caches that hold them from
    `slot` on."""
    rotary = rotary_angles(positions, network.config)
    x = network.backbone.embed(tokens)
    longer = []
    for layer, past in zip(layers, cache, strict=True):
        x, key_value = layer(x, rotary, mask, past, slot)
        longer.append(key_value)
    return network.backbone.norm(x), tuple(longer)
