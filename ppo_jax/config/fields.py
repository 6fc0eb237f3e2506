"""Which values a field of the settings may have, told by its type."""

import math
import numbers
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from qwen_env.errors import UsageError

Part = TypeVar("Part")


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
Finite = Annotated[float, Range("finite", math.isfinite)]
Temperature = Annotated[
    float, Range("above 0 (greedy decoding is its limit) and finite", lambda x: 0 < x < math.inf)
]
Rate = Annotated[float, Range("above 0 and finite", lambda x: 0 < x < math.inf)]


class Checked:
    """Base of dataclasses that refuse a value which the type of its field does not allow.

    A NumPy number becomes a Python number, and an integer where a float belongs becomes one.

    Raises:
        UsageError: names the field, its value, and what it must be.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(settings: Any) -> None:
    """What `Checked` does when it is made; see there."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value = getattr(settings, field.name)
        checked = _checked(field.name, value, hints[field.name])
        if checked is not value:
            object.__setattr__(settings, field.name, checked)  # what a frozen dataclass does itself


def range_of(hint: Any) -> Range | None:
    """The range of a number's type, or of X in `X | None`."""
    for part in (hint, *get_args(hint)):
        for note in getattr(part, "__metadata__", ()):
            if isinstance(note, Range):
                return note
    return None


def part_of(settings: Any, kind: type[Part]) -> Part:
    """The fields that a dataclass `kind` has of `settings`, which have them all."""
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type without its annotations, and whether None is allowed as well."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    (kind,) = (part for part in get_args(hint) if part is not type(None))
    return without_none(kind)[0], True


def _checked(name: str, value: Any, hint: Any) -> Any:
    kind, is_optional = without_none(hint)
    if value is None and is_optional:
        return None
    or_none = ", or None" if is_optional else ""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(map(repr, get_args(kind)))
            raise UsageError(f"{name} is {value!r}; it must be one of {choices}{or_none}.")
        return value
    if kind in (int, float):
        return _checked_number(name, value, kind, range_of(hint), or_none)
    if get_origin(kind) is tuple:
        items, is_list = get_args(kind), get_args(kind)[-1] is Ellipsis
        words = "a list" if is_list else f"{len(items)} values"
        is_right = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_right or not (is_list or len(value) == len(items)):
            raise UsageError(f"{name} is {value!r}; it must be {words}{or_none}.")
        if is_list:
            items = items[:1] * len(value)
        parts = zip(value, items, strict=True)
        return tuple(_checked(f"{name}[{i}]", x, item) for i, (x, item) in enumerate(parts))
    if isinstance(kind, type) and not isinstance(value, kind):
        words = {str: "text", bool: "True or False"}.get(kind, f"a {kind.__name__}")
        raise UsageError(f"{name} is {value!r}; it must be {words}{or_none}.")
    return value


def _checked_number(
    name: str, value: Any, kind: type, range: Range | None, or_none: str
) -> int | float:
    wanted, words = (numbers.Integral, "an integer") if kind is int else (numbers.Real, "a number")
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise UsageError(f"{name} is {value!r}; it must be {words}{or_none}.")
    number: int | float = kind(value)
    if range is not None and not range.holds(number):
        raise UsageError(f"{name} is {number}; it must be {range.words}.")
    return number
