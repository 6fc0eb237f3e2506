"""What a field may hold, by its type. Which setting has which range: see test_settings.py."""

import dataclasses
from math import inf, nan
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest

from ppo_jax.config.fields import (
    Count,
    Decay,
    Factor,
    Limit,
    LimitAboveOne,
    Natural,
    Probability,
    Rate,
    Seed,
    Share,
    Temperature,
    check_fields,
)
from qwen_env.errors import UsageError


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (Count, [1, 7], [0, -1]),
        (Natural, [0, 7], [-1]),
        (Seed, [0, 2**32 - 1], [-1, 2**32]),
        (Share, [0.0, 0.5, 1.0], [-0.1, 1.1, nan]),
        (Decay, [0.0, 0.999], [-0.1, 1.0, nan]),
        (Limit, [1e-9, inf], [0.0, -1.0, nan]),
        (LimitAboveOne, [1.1, inf], [1.0, nan]),
        (Factor, [0.0, 7.0], [-0.1, inf, nan]),
        (Rate, [1e-9, 7.0], [0.0, inf, nan]),
        (Temperature, [1e-9, 7.0], [0.0, -1.0, inf, nan]),
        (Probability, [1e-9, 1.0], [0.0, 1.01, nan]),
    ],
)
@pytest.mark.parametrize("optional", [False, True])
def test_ranges(kind: Any, inside: list[float], outside: list[float], optional: bool) -> None:
    field = ("number", kind | None if optional else kind)
    settings = dataclasses.make_dataclass("Settings", [("name", str), field])
    for number in [*inside, None] if optional else inside:
        check_fields(settings("a", number))
    words = get_args(kind)[1].words
    for number in outside:
        with pytest.raises(UsageError) as error:
            check_fields(settings("a", number))
        assert str(error.value) == f"number is {number}; it must be {words}."


@dataclasses.dataclass(frozen=True)
class Settings:
    size: Count = 1
    rate: Rate | None = None
    kind: Literal["a", "b"] = "a"
    text: str = ""
    flag: bool = False
    folder: Path = Path()
    texts: tuple[str, ...] = ()
    limits: tuple[Share, Share] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 2.5}, "size is 2.5; it must be an integer."),
        ({"size": True}, "size is True; it must be an integer."),
        ({"size": "2"}, "size is '2'; it must be an integer."),
        ({"size": None}, "size is None; it must be an integer."),
        ({"rate": "fast"}, "rate is 'fast'; it must be a number, or None."),
        ({"rate": 1j}, "rate is 1j; it must be a number, or None."),
        ({"rate": [0.1]}, "rate is [0.1]; it must be a number, or None."),
        ({"kind": "c"}, "kind is 'c'; it must be one of 'a', 'b'."),
        ({"kind": ["a"]}, "kind is ['a']; it must be one of 'a', 'b'."),
        ({"text": 3}, "text is 3; it must be text."),
        ({"flag": 1}, "flag is 1; it must be True or False."),
        ({"flag": "yes"}, "flag is 'yes'; it must be True or False."),
        ({"folder": "x"}, "folder is 'x'; it must be a Path."),
        ({"texts": "x"}, "texts is 'x'; it must be a list."),
        ({"texts": ["x", 1]}, "texts[1] is 1; it must be text."),
        ({"limits": 0.5}, "limits is 0.5; it must be 2 values, or None."),
        ({"limits": [0.5]}, "limits is [0.5]; it must be 2 values, or None."),
        ({"limits": [0.5, 2]}, "limits[1] is 2.0; it must be between 0 and 1."),
    ],
)
def test_values_of_another_type(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        Settings(**fields)
    assert str(error.value) == words


def test_numbers_of_numpy_become_those_of_python() -> None:
    settings = Settings(size=np.int64(3), rate=np.float32(0.5))
    assert (settings.size, settings.rate) == (3, 0.5)
    assert (type(settings.size), type(settings.rate)) == (int, float)
    assert type(Settings(rate=2).rate) is float
    assert Settings(texts=["a", "b"]).texts == ("a", "b")  # type: ignore[arg-type]
    assert Settings(limits=[0, np.float32(0.5)]).limits == (0.0, 0.5)  # type: ignore[arg-type]
