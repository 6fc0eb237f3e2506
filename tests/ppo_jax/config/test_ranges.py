"""Which numbers each range holds. Which setting has which: see test_config.py."""

import dataclasses
from math import inf, nan
from typing import Any, get_args

import pytest

from ppo_jax.config.ranges import (
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
    check_ranges,
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
        check_ranges(settings("a", number))
    words = get_args(kind)[1].words
    for number in outside:
        with pytest.raises(UsageError) as error:
            check_ranges(settings("a", number))
        assert str(error.value) == f"number is {number}; it must be {words}."
