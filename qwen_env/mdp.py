"""The token MDP: text generation as a Markov decision process, in pure functions.

A state is a prompt followed by the response written so far; an action is a token id; a
transition writes the action at `length`. The episode is `terminated` by an end-of-sequence id or a
stop string, and `truncated` by the response limit, never both. The reward is zero until the episode
ends, so it is not part of the transition: see `qwen_env.rewards`.

Functions that make arrays take the array namespace `xp` (`numpy` or `jax.numpy`) last, and all take
any number of leading batch axes: the same lines drive the Gymnasium environments one step at a time
and the compiled rollout of `ppo_jax`.

Shapes: P prompt limit, T response limit, S = P + T, V vocabulary; `...` any batch axes.
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

    `eos_token_ids` end the episode. `forbidden_token_ids` can never be chosen; ids of a padded
    vocabulary that have no text belong here. No end-of-sequence id can be chosen before the
    response holds `min_new_tokens` tokens. A stop string ends the episode as soon as the response
    contains it and holds so many tokens; what the prompt contains ends nothing.

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

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_new_tokens", "vocab_size"):
            self._set(name, integer(name, getattr(self, name), at_least=1))
        for name, size in (
            ("vocab_size", self.vocab_size),
            ("max_prompt_length + max_new_tokens", self.max_length),
        ):
            if size > _LARGEST:
                raise UsageError(f"{name} is {size}; it must be at most {_LARGEST} (int32).")
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
    """A batch of states. `tokens` is prompt then response, contiguous, padded on the right."""

    tokens: Array  # int32 [..., S]
    prompt_length: Array  # int32 [...]
    length: Array  # int32 [...], prompt and response together
    terminated: Array  # bool [...]
    truncated: Array  # bool [...]
    stop_state: Array | None = None  # int32 [...], of the automaton of `Rules.stop`, if any


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
    return State(tokens.astype(xp.int32), prompt_length, prompt_length, ended, ended, stop_state)


def step(state: State, action: Array, rules: Rules, xp: Any) -> State:
    """Append `action` (int [...]) to every row that has not ended; ended rows stay as they are."""
    action = xp.int32(action)
    ended = has_ended(state)
    running = ~ended
    slot = state.length * running - ended  # -1, which matches no position, in ended rows
    writes = xp.asarray(_positions(rules.max_length)) == slot[..., None]
    length = state.length + running
    num_written = length - state.prompt_length
    is_end = _is_any_of(rules.eos_token_ids, action)
    stop_state = state.stop_state
    if rules.stop is not None:
        stop_state = xp.where(running, rules.stop.next_state(stop_state, action, xp), stop_state)
        is_end = is_end | ((stop_state == STOPPED) & (num_written >= rules.min_new_tokens))
    is_full = num_written >= rules.max_new_tokens
    return State(
        tokens=xp.where(writes, action[..., None], state.tokens),
        prompt_length=state.prompt_length,
        length=length,
        terminated=state.terminated | (running & is_end),
        truncated=state.truncated | (running & is_full & ~is_end),
        stop_state=stop_state,
    )


def at(state: State, index: Any) -> State:
    """Every array indexed alike: one row or some rows of a batch, or, with None, a batch of one."""
    return State(*(None if field is None else field[index] for field in state))


def has_ended(state: State) -> Array:
    """bool [...]: terminated or truncated."""
    return state.terminated | state.truncated


def was_stopped(state: State) -> Array:
    """bool [...]: terminated by a stop string."""
    return state.terminated & (state.stop_state is not None and state.stop_state == STOPPED)


def response_length(state: State) -> Array:
    """int32 [...]: tokens written so far, the end-of-sequence id included."""
    return state.length - state.prompt_length


def attention_mask(state: State, xp: Any) -> Array:
    """bool [..., S]: True on prompt and response."""
    return xp.asarray(_positions(state.tokens.shape[-1])) < state.length[..., None]


def action_mask(num_written: Array, rules: Rules, xp: Any) -> Array:
    """The actions that may be chosen.

    Args:
        num_written: int [...], response tokens written before the choice (`response_length`).

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
