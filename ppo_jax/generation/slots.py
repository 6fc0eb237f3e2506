"""The loop of a rollout: every row is written in a slot, all slots a token a step.

Once rows have stopped, the loop may go on in fewer and fewer slots. Or there are fewer slots than
rows from the beginning, and as rows end, the next ones take their slots.

Shapes: B batch, N slots, P prompt limit, T response limit, S = P + T, V vocabulary, D hidden.
"""

import math
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from ppo_jax.generation.decoding import (
    choose_token,
    decode,
    in_compute_type,
    num_slots_in_use,
    prefill_in_loop,
)
from ppo_jax.models.attention import KeyValue
from ppo_jax.models.decoder import DecoderLayer
from ppo_jax.models.heads import PolicyValueNetwork
from ppo_jax.sampling import Sampling, pack_bits
from qwen_env import mdp

Tree = TypeVar("Tree")


class Writing(NamedTuple):
    """How responses are written; constants.

    Tokens are drawn from the sampling distribution over the allowed ids, or are the most probable
    ones if `greedy`. With `compacts_rows` the loop goes on in fewer and fewer slots as rows stop,
    which saves time where responses are ragged, and takes longer to compile. With `num_slots` below
    the number of rows, no more are written at a time, and caches have room for no more; there is
    one turn then. With `bounds_reads` the loop is cut where a quarter, a half and three quarters of
    the caches' room for responses are in use, and reads no more of them until then, if that saves
    an eighth of what a step reads. With `keeps_masks`, what each token was drawn from is recorded,
    for learning.
    """

    rules: mdp.Rules
    sampling: Sampling = Sampling()
    greedy: bool = False
    compacts_rows: bool = False
    num_slots: int | None = None
    bounds_reads: bool = False
    keeps_masks: bool = True


class Slots(NamedTuple):
    """N of the B rows."""

    row: Int[Array, "N"]  # which; B where a slot has none
    key: Key[Array, "N"]
    state: mdp.State
    cache: tuple[KeyValue, ...]


class Draws(NamedTuple):
    """What is recorded of the tokens of all rows."""

    logprobs: Float[Array, "B T"]  # 0 where none was drawn
    sampling_mask: UInt8[Array, "B T V/8"] | None  # all bits 1 where none was drawn

    @classmethod
    def none(cls, num_rows: int, writing: Writing) -> Self:
        rules = writing.rules
        shape = num_rows, rules.max_new_tokens
        sampling_mask = None
        if writing.keeps_masks and writing.sampling.is_truncated:
            sampling_mask = jnp.full((*shape, -(-rules.vocab_size // 8)), _EVERYTHING)
        return cls(jnp.zeros(shape, jnp.float32), sampling_mask)


class _Carry(NamedTuple):
    step: Int[Array, ""]  # decode steps so far
    slots: Slots
    draws: Draws


class Writer(NamedTuple):
    """A network, made ready to write in a loop."""

    network: PolicyValueNetwork
    layers: list[DecoderLayer]
    writing: Writing

    @classmethod
    def of(cls, network: PolicyValueNetwork, writing: Writing) -> Self:
        network = in_compute_type(network)
        return cls(network, network.backbone.unstacked_layers(), writing)

    def write(self, hidden: Float[Array, "B D"], slots: Slots, draws: Draws) -> tuple[Slots, Draws]:
        """From the hidden states of the last tokens until no row is running.

        Args:
            slots: one for each row, in their order.

        Returns:
            both as they are then; caches only where there are several turns.
        """
        most, *fewer = self._stages(len(slots.row))
        start = self._choose(hidden, _Carry(jnp.zeros((), jnp.int32), slots, draws))
        end = self._in_fewer_slots(self._until(most, start), most, *fewer)
        return end.slots, end.draws

    def write_in_turn(
        self, prompts: mdp.State, states: mdp.State, keys: Key[Array, "B"], draws: Draws
    ) -> tuple[mdp.State, Draws]:
        """All rows from their beginning to their end, in fewer slots.

        Whenever as many slots are free as a group has rows, the next group takes them.

        Args:
            prompts: each once, for as many completions as there are rows for it.
            states: of all rows, before they begin.
        """
        rules, num_slots, num_rows = self.writing.rules, self.writing.num_slots, len(keys)
        assert num_slots is not None and rules.max_turns == 1
        size = group_size(num_slots, num_rows, len(prompts.length), rules.max_new_tokens)
        num_groups = num_rows // size
        most, *fewer = self._stages(num_slots)

        def begin_group(
            carry: tuple[mdp.State, _Carry], group: tuple[mdp.State, Array, Array, Array]
        ) -> tuple[tuple[mdp.State, _Carry], None]:
            (states, carried), (prompts, row, key, until) = carry, group
            read = prefill_in_loop(self.network, self.layers, prompts, rules)
            hidden, cache, state = each((*read, prompts), size)
            begun = self._choose(hidden, carried._replace(slots=Slots(row, key, state, cache)))
            slots = carried.slots
            free = jnp.argsort(mdp.is_running(slots.state))[:size]  # those come first
            states = _put(states, slots.row[free], _at(slots.state, free))
            begun = begun._replace(slots=_put(slots, free, begun.slots))
            return (states, self._until(until, begun)), None

        def in_groups(x: Array) -> Array:
            """Each group's part, or the prompt that all its rows have."""
            return each(x, max(len(x), num_groups)).reshape(num_groups, -1, *x.shape[1:])

        groups = jax.tree.map(in_groups, (prompts, jnp.arange(num_rows), keys))
        until = jnp.full(num_groups, num_slots - size).at[-1].set(most)
        start = _Carry(jnp.zeros((), jnp.int32), self._free_slots(states, keys), draws)
        (states, end), _ = jax.lax.scan(begin_group, (states, start), (*groups, until))
        end = self._in_fewer_slots(end, most, *fewer)
        return _put(states, end.slots.row, end.slots.state), end.draws

    def _free_slots(self, states: mdp.State, keys: Key[Array, "B"]) -> Slots:
        num_slots, config = self.writing.num_slots, self.network.config
        assert num_slots is not None
        shape = num_slots, config.num_key_value_heads, states.tokens.shape[1], config.head_dim
        nothing = jnp.zeros(shape, self.network.backbone.dtype)
        ended = _at(states, slice(num_slots))._replace(terminated=jnp.ones(num_slots, bool))
        cache = (KeyValue(nothing, nothing),) * config.num_hidden_layers
        return Slots(jnp.full(num_slots, len(keys)), keys[:num_slots], ended, cache)

    def _stages(self, num_slots: int) -> list[int]:
        """In how many slots the loop goes on, each time that no more rows are running."""
        shares = SHARES if self.writing.compacts_rows else ()
        return sorted({int(share * num_slots) for share in shares} | {0}, reverse=True)

    def _until(self, count: Int[Array, ""] | int, carry: _Carry) -> _Carry:
        """A token a step, until no more than `count` rows are running."""

        def goes_on(num_read: int, carry: _Carry) -> Bool[Array, ""]:
            state = carry.slots.state
            is_enough = num_slots_in_use(state, carry.step, self.writing.rules) <= num_read
            some_run: Array = mdp.is_running(state).sum() > count
            return some_run & is_enough

        for num_read in self._reads(len(carry.slots.row)):
            carry = jax.lax.while_loop(
                partial(goes_on, num_read), partial(self._advance, num_read), carry
            )
        return carry

    def _reads(self, num_rows: int) -> list[int]:
        """How many slots of so many rows are read, each time that more are in use."""
        rules, config = self.writing.rules, self.network.config
        num_weights = sum(x.size for x in jax.tree.leaves(nnx.state(self.layers)))
        num_weights += self.network.backbone.unembedding.size
        of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        read = num_weights + of_a_token * num_rows * rules.max_length
        # Of the room for responses, a half is not in use on average, and with four cuts an eighth.
        saved = of_a_token * num_rows * rules.max_new_tokens * 3 // 8
        is_worth_it = self.writing.bounds_reads and 8 * saved >= read
        # Where rows take each other's slots, all are soon in use.
        if not is_worth_it or self.writing.num_slots is not None:
            return [rules.max_length]
        return [rules.max_prompt_length + rules.max_new_tokens * n // 4 for n in (1, 2, 3, 4)]

    def _in_fewer_slots(self, carry: _Carry, count: int, *fewer: int) -> _Carry:
        """On with those that are running, which are `count` at most, until none is."""
        slots = carry.slots
        if self.writing.rules.max_turns == 1:
            slots = slots._replace(cache=())
        if count > 0:
            some = jnp.argsort(~mdp.is_running(slots.state))[:count]  # those come first
            carry = self._until(fewer[0], carry._replace(slots=_at(carry.slots, some)))
            carry = self._in_fewer_slots(carry, *fewer)
            slots = _put(slots, some, carry.slots)
        return carry._replace(slots=slots)

    def _advance(self, num_read: int, carry: _Carry) -> _Carry:
        """Read the last token of each row, and draw the next."""
        state, cache = carry.slots.state, carry.slots.cache
        rules = self.writing.rules
        hidden, cache = decode(self.network, self.layers, state, cache, carry.step, rules, num_read)
        slots = carry.slots._replace(cache=cache)
        return self._choose(hidden, carry._replace(step=carry.step + 1, slots=slots))

    def _choose(self, hidden: Float[Array, "N D"], carry: _Carry) -> _Carry:
        """Draw each row's next token from the hidden state of its last."""
        rules, slots = self.writing.rules, carry.slots
        running = mdp.is_running(slots.state)
        number = mdp.response_length(slots.state)
        token, logprob, sampling_mask = choose_token(
            self.network,
            hidden,
            mdp.turn_length(slots.state),
            jax.vmap(jax.random.fold_in)(slots.key, number),
            rules=rules,
            sampling=self.writing.sampling,
            greedy=self.writing.greedy,
        )

        def record(x: Array, drawn: Array) -> Array:
            if len(x) == len(drawn) and rules.max_turns == 1:  # all rows, which are in step
                return jax.lax.dynamic_update_slice_in_dim(x, drawn[:, None], carry.step, axis=1)
            place = jnp.where(running, number, rules.max_new_tokens)  # where there is none
            return x.at[slots.row, place].set(drawn, mode="drop")

        logprobs, sampling_masks = carry.draws
        if sampling_masks is not None and sampling_mask is not None:
            sampling_mask = jnp.where(running[:, None], pack_bits(sampling_mask), _EVERYTHING)
            sampling_masks = record(sampling_masks, sampling_mask)
        logprobs = record(logprobs, jnp.where(running, logprob, 0.0))
        return carry._replace(
            slots=slots._replace(state=mdp.step(slots.state, token, rules, jnp)),
            draws=Draws(logprobs, sampling_masks),
        )


SHARES = 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16
"""Of the slots, in which a rollout goes on once no more rows are running."""

_EVERYTHING = np.uint8(255)  # eight ids that may all be drawn


def group_size(num_slots: int, num_rows: int, num_prompts: int, max_new_tokens: int) -> int:
    """How many rows begin together, where there are fewer slots than rows.

    The fewer, the more often weights are read for their prompts; the more, the longer slots are
    free before they have enough. Say a row is written for T / 2 steps, and weights are read as
    fast as in a decode step. Then groups of n cost 2 N / (n T) of the time and n / 2 N of the
    slots, which is least at n = 2 N / √T. A group has whole prompts, or a part of one.
    """
    completions = num_rows // num_prompts
    best = min(int(2 * num_slots / math.sqrt(max_new_tokens)), num_slots)
    fitting = (n for n in range(2, best + 1) if completions % n == 0 or n % completions == 0)
    return max((n for n in fitting if num_rows % n == 0), default=1)


def each(tree: Tree, count: int) -> Tree:
    """Every array repeated along its first axis, which is `count` long then."""
    rows: Tree = jax.tree.map(lambda x: jnp.repeat(x, count // len(x), axis=0), tree)
    return rows


def _at(tree: Tree, index: Any) -> Tree:
    """Every array indexed alike."""
    part: Tree = jax.tree.map(lambda x: x[index], tree)
    return part


def _put(whole: Tree, index: Int[Array, "n"], part: Tree) -> Tree:
    """Every array with the rows of its `part`, or their beginnings, at `index`, or left out where
    that is beyond the last."""

    def put(x: Array, rows: Array) -> Array:
        return x.at[(index, *map(slice, rows.shape[1:]))].set(rows, mode="drop")

    result: Tree = jax.tree.map(put, whole, part)
    return result
