"""The token MDP: text generation as a Markov decision process, in pure functions.

A state is a prompt followed by the response written so far; an action is a token id; a
transition writes the action at `length`. An end-of-sequence id or a stop string ends a turn. The
last of `max_turns` turns ends the episode, which is then `terminated`; after any other the episode
waits for a `reply`, tokens that the policy did not choose, and goes on behind it. The response
limit, which counts replies as well, leaves an episode `truncated`, never both. With one turn, the
default, nothing waits. Rewards are not part of the transitions: see `qwen_env.rewards` and
`qwen_env.interaction`.

Functions that make arrays take the array namespace `xp` (`numpy` or `jax.numpy`) last, and all take
any number of leading batch axes: the same lines drive the Gymnasium environments one step at a time
and the compiled rollout of `ppo_jax`.

Shapes: P prompt limit, T response limit, S = P + T, R width of replies, V vocabulary; `...` any
batch axes.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwen_env.arguments import integer, token_ids
from qwen_env.errors import UsageError
from qwen_env.stop_strings import START, STOPPED, StopStrings

Array = Any  # a NumPy or a JAX array: the functions below are written for both

PAD_TOKEN_ID = 0
"""What `tokens` holds after `length`. Lengths say what is real; no code compares ids with this."""

_LARGEST = 2**31 - 1  # ids and lengths are int32


@dataclass(frozen=True)
class Rules:
    """The constants of the MDP. Hashable, so that a compiled function can take it statically.

    `eos_token_ids` end a turn, and the last of `max_turns` turns ends the episode.
    `forbidden_token_ids` can never be chosen; ids of a padded vocabulary that have no text belong
    here. No end-of-sequence id can be chosen before the turn holds `min_new_tokens` tokens. A stop
    string ends the turn as soon as the turn contains it and holds so many tokens. What prompt and
    replies contain ends nothing. `max_new_tokens` counts all that follows the prompt.

    Raises:
        UsageError: a limit is out of range, an id is outside the vocabulary, or nothing is allowed.
    """

    max_prompt_length: int
    max_new_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    forbidden_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    stop: StopStrings | None = None
    max_turns: int = 1

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_new_tokens", "vocab_size"):
            self._set(name, integer(name, getattr(self, name), at_least=1))
        for name, size in (
            ("vocab_size", self.vocab_size),
            ("max_prompt_length + max_new_tokens", self.max_length),
        ):
            if size > _LARGEST:
                raise UsageError(f"{name} is {size}; it must be at most {_LARGEST} (int32).")
        self._set("max_turns", integer("max_turns", self.max_turns, at_least=1))
        self._set("min_new_tokens", integer("min_new_tokens", self.min_new_tokens))
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens is {self.min_new_tokens}; it must lie between 0 and "
                f"max_new_tokens ({self.max_new_tokens})."
            )
        for name in ("eos_token_ids", "forbidden_token_ids"):
            ids = token_ids(name, getattr(self, name))
            self._set(name, ids)
            if ids and not (ids[0] >= 0 and ids[-1] < self.vocab_size):
                raise UsageError(
                    f"{name} holds {ids[0] if ids[0] < 0 else ids[-1]}, which is outside the "
                    f"vocabulary (0 to {self.vocab_size - 1})."
                )
        if not self.eos_token_ids:
            raise UsageError(
                "eos_token_ids is empty, so no episode could end by itself; "
                "name at least one end-of-sequence id."
            )
        choosable = self.vocab_size - len(self.forbidden_token_ids)
        if self.min_new_tokens:
            choosable -= len(set(self.eos_token_ids) - set(self.forbidden_token_ids))
        if choosable < 1:
            raise UsageError(
                "every token is forbidden; leave at least one id out of forbidden_token_ids "
                "(and, with min_new_tokens above 0, one that is not an end-of-sequence id)."
            )

    @property
    def max_length(self) -> int:
        """S, the width of `State.tokens`."""
        return self.max_prompt_length + self.max_new_tokens

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # what a frozen dataclass does itself


class State(NamedTuple):
    """A batch of states. `tokens` is prompt then response, contiguous, padded on the right.

    The last four are None where `Rules.max_turns` is 1.
    """

    tokens: Array  # int32 [..., S]
    prompt_length: Array  # int32 [...]
    length: Array  # int32 [...], prompt and response together
    terminated: Array  # bool [...]
    truncated: Array  # bool [...]
    stop_state: Array | None = None  # int32 [...], of the automaton of `Rules.stop`, if any
    own: Array | None = None  # bool [..., S], the tokens that the policy chose
    turn_start: Array | None = None  # int32 [...], where the turn under way began
    num_turns: Array | None = None  # int32 [...], turns that the policy has ended
    turn_ended: Array | None = None  # bool [...], with nothing behind it yet; not by the last turn


def initial_state(prompt_ids: Array, prompt_length: Array, rules: Rules, xp: Any) -> State:
    """The state before the first action.

    Args:
        prompt_ids: int [..., P], padded on the right with anything.
        prompt_length: int [...], the number of real tokens, 1 to P.
    """
    prompt_ids = xp.asarray(prompt_ids, dtype=xp.int32)
    prompt_length = xp.asarray(prompt_length, dtype=xp.int32)
    is_real = xp.asarray(_positions(rules.max_prompt_length)) < prompt_length[..., None]
    response = xp.full((*prompt_ids.shape[:-1], rules.max_new_tokens), PAD_TOKEN_ID, xp.int32)
    tokens = xp.concatenate([xp.where(is_real, prompt_ids, PAD_TOKEN_ID), response], axis=-1)
    ended = xp.zeros(prompt_length.shape, dtype=bool)
    stop_state = None if rules.stop is None else xp.full(prompt_length.shape, START, xp.int32)
    state = State(tokens.astype(xp.int32), prompt_length, prompt_length, ended, ended, stop_state)
    if rules.max_turns == 1:
        return state
    return state._replace(
        own=xp.zeros(tokens.shape, dtype=bool),
        turn_start=prompt_length,
        num_turns=xp.zeros_like(prompt_length),
        turn_ended=ended,
    )


def step(state: State, action: Array, rules: Rules, xp: Any) -> State:
    """Append `action` (int [...]) to every row that is running; other rows stay as they are."""
    action = xp.int32(action)
    stopped = _has_stopped(state)
    running = ~stopped
    slot = state.length * running - stopped  # -1, which matches no position, in other rows
    writes = xp.asarray(_positions(rules.max_length)) == slot[..., None]
    length = state.length + running
    is_end = _is_any_of(rules.eos_token_ids, action)
    stop_state = state.stop_state
    if rules.stop is not None:
        stop_state = xp.where(running, rules.stop.next_state(stop_state, action, xp), stop_state)
        has_enough = length - turn_start(state) >= rules.min_new_tokens
        is_end = is_end | ((stop_state == STOPPED) & has_enough)
    is_full = length - state.prompt_length >= rules.max_new_tokens
    ends_turn = ends_episode = running & is_end
    own, num_turns, turn_ended = state.own, state.num_turns, state.turn_ended
    if rules.max_turns > 1:
        own, num_turns = own | writes, num_turns + ends_turn
        ends_episode = ends_turn & (num_turns >= rules.max_turns)
        turn_ended = turn_ended | (ends_turn & ~ends_episode)
    return State(
        xp.where(writes, action[..., None], state.tokens),
        state.prompt_length,
        length,
        state.terminated | ends_episode,
        state.truncated | (running & is_full & ~is_end),
        stop_state,
        own,
        state.turn_start,
        num_turns,
        turn_ended,
    )


def reply(state: State, ids: Array, count: Array, done: Array, rules: Rules, xp: Any) -> State:
    """Append a reply to every row that waits for one, or end it; other rows stay as they are.

    A reply is appended whole, with room for an action behind it, or not at all: the row is then
    truncated. So the last token of an episode is always an action.

    Args:
        ids: int [..., R], padded on the right with anything.
        count: int [...], the tokens of each reply: 1 to R, or more than there is room for.
        done: bool [...], that the interaction ends the episode here: it is terminated.
    """
    waiting, fits = waits(state), has_room(state, count, rules)
    goes_on = waiting & fits & ~done
    length = state.length + xp.where(goes_on, count, 0)
    offset = xp.asarray(_positions(rules.max_length)) - state.length[..., None]
    taken = xp.take_along_axis(ids, xp.clip(offset, 0, ids.shape[-1] - 1), axis=-1)
    is_new = (offset >= 0) & (offset < (length - state.length)[..., None])
    stop_state = state.stop_state
    if stop_state is not None:
        stop_state = xp.where(goes_on, xp.int32(START), stop_state)
    return state._replace(
        tokens=xp.where(is_new, taken, state.tokens).astype(xp.int32),
        length=length.astype(xp.int32),
        terminated=state.terminated | (waiting & done),
        truncated=state.truncated | (waiting & ~fits & ~done),
        stop_state=stop_state,
        turn_start=xp.where(goes_on, length, state.turn_start).astype(xp.int32),
        turn_ended=state.turn_ended & ~goes_on,
    )


def at(state: State, index: Any) -> State:
    """Every array indexed alike: one row or some rows of a batch, or, with None, a batch of one."""
    return State(*(None if field is None else field[index] for field in state))


def put(state: State, rows: np.ndarray, some: State) -> State:
    """A copy of a batch of NumPy arrays, with `some` in the place of `rows`."""
    whole = State(*(None if field is None else field.copy() for field in state))
    for field, value in zip(whole, some, strict=True):
        if field is not None:
            field[rows] = value
    return whole


def has_ended(state: State) -> Array:
    """bool [...]: terminated or truncated."""
    return state.terminated | state.truncated


def is_running(state: State) -> Array:
    """bool [...]: the next token is the policy's to choose."""
    return ~_has_stopped(state)


def _has_stopped(state: State) -> Array:
    stopped = state.terminated | state.truncated
    return stopped if state.turn_ended is None else stopped | state.turn_ended


def waits(state: State) -> Array:
    """bool [...]: for a reply."""
    return ~has_ended(state) & (state.turn_ended is not None and state.turn_ended)


def turns_ended(state: State) -> Array:
    """int32 [...]: the turns that the policy has ended, the last included."""
    return state.terminated.astype(np.int32) if state.num_turns is None else state.num_turns


def has_room(state: State, count: Array, rules: Rules) -> Array:
    """bool [...]: for a reply of `count` tokens, and an action behind it."""
    return count < rules.max_new_tokens - response_length(state)


def was_stopped(state: State) -> Array:
    """bool [...]: terminated by a stop string."""
    return state.terminated & (state.stop_state is not None and state.stop_state == STOPPED)


def was_cut_off(state: State) -> Array:
    """bool [...]: truncated by the response limit within a turn, and not by a reply without room.

    Only then is the last state one in which the policy would have chosen a token.
    """
    return state.truncated & (state.turn_ended is None or ~state.turn_ended)


def response_length(state: State) -> Array:
    """int32 [...]: tokens behind the prompt, end-of-sequence ids and replies included."""
    return state.length - state.prompt_length


def turn_start(state: State) -> Array:
    """int32 [...]: where the turn under way began, behind the prompt or the last reply."""
    return state.prompt_length if state.turn_start is None else state.turn_start


def turn_length(state: State) -> Array:
    """int32 [...]: tokens of the turn under way."""
    return state.length - turn_start(state)


def own_mask(state: State, xp: Any) -> Array:
    """bool [..., S]: True on the tokens that the policy chose: neither prompt nor reply."""
    if state.own is not None:
        return state.own
    positions = xp.asarray(_positions(state.tokens.shape[-1]))
    return (positions >= state.prompt_length[..., None]) & (positions < state.length[..., None])


def response_mask(state: State, max_new_tokens: int, xp: Any) -> Array:
    """bool [..., T]: `own_mask` from the first token behind the prompt on."""
    steps = xp.asarray(_positions(max_new_tokens))
    written = steps < response_length(state)[..., None]
    if state.own is None:
        return written
    index = xp.minimum(state.prompt_length[..., None] + steps, state.tokens.shape[-1] - 1)
    return written & xp.take_along_axis(state.own, index, axis=-1)


def attention_mask(state: State, xp: Any) -> Array:
    """bool [..., S]: True on prompt and response."""
    return xp.asarray(_positions(state.tokens.shape[-1])) < state.length[..., None]


def action_mask(num_written: Array, rules: Rules, xp: Any) -> Array:
    """The actions that may be chosen.

    Args:
        num_written: int [...], tokens of the turn written before the choice (`turn_length`).

    Returns:
        bool [..., V], True where the action is allowed.
    """
    always, late = (xp.asarray(mask) for mask in _allowed_ids(rules))
    if rules.min_new_tokens == 0:
        return xp.broadcast_to(late, num_written.shape + late.shape)
    return xp.where((num_written < rules.min_new_tokens)[..., None], always, late)


@functools.cache
def _positions(count: int) -> np.ndarray:
    """int32 [count], the type of lengths. Making it takes NumPy longer than using it."""
    positions = np.arange(count, dtype=np.int32)
    positions.flags.writeable = False
    return positions


def _is_any_of(members: tuple[int, ...], ids: Array) -> Array:
    """bool, shaped like `ids`; for the few end-of-sequence ids, cheaper than a set operation."""
    found = ids == members[0]
    for member in members[1:]:
        found = found | (ids == member)
    return found


@functools.cache
def _allowed_ids(rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """bool [V] twice: the ids allowed at every step, and those allowed from min_new_tokens on."""
    late = np.ones(rules.vocab_size, dtype=bool)
    late[list(rules.forbidden_token_ids)] = False
    always = late.copy()
    always[list(rules.eos_token_ids)] = False
    return always, late
