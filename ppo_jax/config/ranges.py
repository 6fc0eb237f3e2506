"""Ranges of numbers, as types of settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from qwen_env.errors import UsageError


@dataclass(frozen=True)
class Range:
    """Annotates the type of a number."""

    words: str  # that follow "it must be"
    holds: Callable[[Any], bool]  # False of NaN


Count = Annotated[int, Range("at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Range("at least 0", lambda x: x >= 0)]
Seed = Annotated[int, Range("at least 0 and below 2**32", lambda x: 0 <= x < 2**32)]
Share = Annotated[float, Range("between 0 and 1", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]
# An infinite limit, such as max_grad_norm, limits nothing; an infinite factor ends in NaN.
Limit = Annotated[float, Range("above 0", lambda x: x > 0)]
LimitAboveOne = Annotated[float, Range("above 1", lambda x: x > 1)]
Factor = Annotated[float, Range("at least 0 and finite", lambda x: 0 <= x < math.inf)]
Probability = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
Temperature = Annotated[
    float, Range("above 0 (greedy decoding is its limit) and finite", lambda x: 0 < x < math.inf)
]
Rate = Annotated[float, Range("above 0 and finite", lambda x: 0 < x < math.inf)]


def ranges(settings: type) -> dict[str, Range]:
    """Of the fields of a dataclass, those that have one."""
    return {
        name: note
        for name, hint in get_type_hints(settings, include_extras=True).items()
        for part in (hint, *get_args(hint))  # X, or X | None
        for note in getattr(part, "__metadata__", ())
        if isinstance(note, Range)
    }


def check_ranges(settings: Any) -> None:
    """Refuse values that no run could have; None always stands for no number.

    Raises:
        UsageError: a field is out of its range.
    """
    for name, range in ranges(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and not range.holds(value):
            raise UsageError(f"{name} is {value}; it must be {range.words}.")
