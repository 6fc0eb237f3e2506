"""Options in a task's name: what they say as text, as values."""

import types
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any

from qwen_env.errors import UsageError


def parsed(name: str, text: str, hint: Any) -> Any:
    """`text`, called `name` in messages, as the type `hint`; the items of a list have commas
    between them.

    Raises:
        UsageError: it is not of that type, or no text can be.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text == "None" and type(None) in parts:
            return None
        (hint,) = (part for part in parts if part is not type(None))
        return parsed(name, text, hint)
    if hint is bool:
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
        raise UsageError(f"{name} is {text!r}; it must be true or false.")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "an integer" if hint is int else "a number"
            raise UsageError(f"{name} is {text!r}; it must be {kind}.") from None
    if hint is str:
        return text
    if origin is typing.Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        choices = {str(part): part for part in parts} or {part.name: part for part in hint}
        if text in choices:
            return choices[text]
        raise UsageError(f"{name} is {text!r}; it must be one of {', '.join(map(repr, choices))}.")
    if origin in (list, tuple, Sequence):
        items = [item.strip() for item in text.split(",")] if text else []
        values = [parsed(f"item {i} of {name}", item, parts[0]) for i, item in enumerate(items)]
        return tuple(values) if origin is tuple else values
    raise UsageError(
        f"{name} cannot be written as text; make the task in Python, with the functions of "
        "qwen_env.tasks."
    )
