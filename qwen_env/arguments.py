"""Checks that many arguments share, so that their messages agree."""

import math
import operator
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from qwen_env.errors import UsageError


def integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """`value`, called `name` in messages, as an int; NumPy's integers are integers too.

    Raises:
        UsageError: it is not an integer, or too small.
    """
    try:
        number = _index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}; it must be an integer.") from None
    if at_least is not None and number < at_least:
        raise UsageError(f"{name} is {number}; it must be at least {at_least}.")
    return number


def finite(name: str, value: Any) -> float:
    """`value`, called `name` in messages, as a float.

    Raises:
        UsageError: it is not a number, or not a finite one.
    """
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name} is {value!r}; it must be a finite number.")
    return number


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a `value`, called `name` in messages, that is not one of `choices`.

    Raises:
        UsageError: it is something else.
    """
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def token_ids(name: str, ids: Any) -> tuple[int, ...]:
    """An id, or any iterable of ids, sorted and without repetitions.

    Raises:
        UsageError: something else, text for instance.
    """
    try:
        return (_index(ids),)
    except TypeError:
        pass
    try:
        if isinstance(ids, Iterable) and not isinstance(ids, str | bytes):
            return tuple(sorted({_index(i) for i in ids}))
    except TypeError:
        pass
    raise UsageError(
        f"{name} is {reprlib.repr(ids)}; it must be a list of token ids, which are integers."
    )


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A text, or any iterable of texts, without repetitions.

    Raises:
        UsageError: something else, or an empty text.
    """
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, Iterable) and not isinstance(listed, bytes):
        found = list(listed)
        if all(isinstance(text, str) and text for text in found):
            return tuple(dict.fromkeys(found))
    raise UsageError(
        f"{name} is {reprlib.repr(value)}; it must be text or a list of texts, none of them empty."
    )


def _index(value: Any) -> int:
    """`operator.index`, but True and False are not integers."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)
