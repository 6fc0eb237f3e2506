"""Stop strings: texts that end a response, found token by token without decoding anything.

They are searched for in the bytes that tokens stand for, by an automaton (Aho and Corasick, 1975)
whose state is how much of a stop string the response ends with. A token is several bytes, so its
way through the automaton is computed beforehand from every state; a step of the MDP is then one
look-up. Tokens that lead alike share a row of the table.
"""

import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from qwen_env.errors import UsageError

Array = Any  # a NumPy or a JAX array

START = 0
"""The automaton's state at the beginning of a response."""

STOPPED = 255
"""The state from the moment on at which the response contains a stop string."""


@dataclass(frozen=True)
class StopStrings:
    """The automaton of `strings` over a vocabulary of V tokens.

    Hashable by what it holds, as the MDP's rules must be: two arrays, as bytes.
    """

    strings: tuple[str, ...]
    row_bytes: bytes = field(repr=False)  # int32 [V]: a token's row of the table
    table_bytes: bytes = field(repr=False)  # uint8 [rows, 256]: by state, the next state

    def next_state(self, state: Array, token: Array, xp: Any) -> Array:
        """int32 [...]: the state after `token` (int [...]), from `state` (int32 [...])."""
        row, table = (xp.asarray(array) for array in self._arrays)
        return table[row[token], state]

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        table = np.frombuffer(self.table_bytes, np.uint8).reshape(-1, 256)
        return np.frombuffer(self.row_bytes, np.int32), table.astype(np.int32)


def make_stop_strings(
    strings: tuple[str, ...],
    token_bytes: Mapping[int, bytes],
    *,
    vocab_size: int,
    usable_ids: Collection[int],
    max_new_tokens: int,
) -> StopStrings:
    """The automaton of `strings`.

    Args:
        token_bytes: what each id adds to a text; nothing, if it is left out.
        usable_ids: those that a response can hold before its end.

    Raises:
        UsageError: the strings are too long, or one of them can never occur.
    """
    encoded = [_checked(string) for string in strings]
    usable = {token_bytes.get(i, b"") for i in usable_ids}
    for string, one in zip(strings, encoded, strict=True):
        if not _can_occur(one, usable, max_new_tokens):
            raise UsageError(
                f"stop holds {reprlib.repr(string)}, which no response of {max_new_tokens} tokens "
                "can contain; leave it out, or raise max_new_tokens."
            )
    automaton = _Automaton(encoded)
    rows: dict[bytes, int] = {}
    row_of_token = [
        rows.setdefault(automaton.next_states(token_bytes.get(i, b"")), len(rows))
        for i in range(vocab_size)
    ]
    table = b"".join(row.ljust(STOPPED, b"\0") + bytes([STOPPED]) for row in rows)
    return StopStrings(strings, np.array(row_of_token, np.int32).tobytes(), table)


def _checked(string: str) -> bytes:
    try:
        encoded = string.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        encoded = b""
    if not encoded or "\ufffd" in string:
        raise UsageError(
            f"stop holds {string!a}, which is not valid Unicode text or has the character of what "
            "is not (U+FFFD); leave it out."
        )
    return encoded


class _Automaton:
    """Over bytes. A state is the longest end of the text that begins a string: its number."""

    def __init__(self, strings: Iterable[bytes]) -> None:
        strings = tuple(strings)
        prefixes = sorted({s[:i] for s in strings for i in range(len(s))}, key=len)
        if len(prefixes) > STOPPED:
            raise UsageError(
                f"stop holds strings of {len(prefixes)} bytes in all, where a common beginning "
                f"counts once; they can have at most {STOPPED}."
            )
        number = {prefix: i for i, prefix in enumerate(prefixes)}

        def state_of(text: bytes) -> int:
            if text.endswith(strings):
                return STOPPED
            return next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)

        self._states = bytes(number.values())
        self._after = []  # for each byte, the next state by state, as `bytes.translate` takes it
        for byte in range(256):
            after = bytearray(256)
            after[STOPPED] = STOPPED
            if any(byte in string for string in strings):
                after[: len(prefixes)] = (state_of(p + bytes([byte])) for p in prefixes)
            self._after.append(bytes(after))

    def next_states(self, text: bytes) -> bytes:
        """By state, the state after `text`; STOPPED stays as it is, and is left out."""
        states = self._states
        for byte in text:
            states = states.translate(self._after[byte])
        return states


def _can_occur(string: bytes, texts: Iterable[bytes], at_most: int) -> bool:
    """Whether so many texts, one behind the other, can contain `string`."""
    automaton = _Automaton([string])
    moves = {automaton.next_states(text) for text in texts}
    reached = {START}
    for _ in range(at_most):
        further = reached | {move[state] for move in moves for state in reached}
        if STOPPED in further:
            return True
        if further == reached:
            return False
        reached = further
    return False
