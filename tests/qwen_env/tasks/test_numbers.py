"""Numbers in text. Their values are those that Python's `Fraction` and `Decimal` give."""

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_env.tasks.numbers import numbers_in, plain


def values(text):
    return [found.value for found in numbers_in(plain(text))]


INTEGERS = st.integers(-(10**12), 10**12)
DECIMALS = st.decimals(-(10**9), 10**9, places=3).filter(lambda number: not number.is_signed())


@given(INTEGERS)
def test_an_integer_however_it_is_written(number):
    minus, digits = "-" if number < 0 else "", f"{abs(number):,}"
    for text in (
        str(number),
        f"{minus}{digits}",
        f"{minus}{digits}.00",
        f"{minus}${digits}",
        f"${minus}{digits}",
        f"{minus}{digits}%",
        f"**{minus}{digits}**.",
        f"\\boxed{{{minus}{digits}}}",
        f"{minus}{digits}".replace(",", "{,}"),
        f"{minus}{digits}".replace(",", "\u202f"),
        f"{minus}{digits}".replace("-", "\u2212"),
    ):
        assert values(text) == [number], text


@given(DECIMALS)
def test_decimals_are_exact(number: Decimal):
    for text in (f"{number:f}", f"{number:,f}", f"{number:f}000", f"costs ${number:f}."):
        assert values(text) == [Fraction(number)]


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_fractions(top, bottom):
    assert values(f"{top}/{bottom}") == [Fraction(top, bottom)]
    assert values(f"\\frac{{{top}}}{{{bottom}}}") == [Fraction(top, bottom)]


@given(st.integers(-999, 999), st.integers(0, 20))
def test_exponents(mantissa, exponent):
    assert values(f"{mantissa}e{exponent}") == [Fraction(f"{mantissa}e{exponent}")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1 + 0.2", [Fraction(1, 10), Fraction(1, 5)]),
        (".5 and -.5", [Fraction(1, 2), Fraction(-1, 2)]),
        ("5-3", [5, 3]),  # a difference
        ("5 - 3", [5, 3]),
        ("18\u201320", [18, 20]),  # a range
        ("(-5)", [-5]),
        ("x=-5", [-5]),
        ("...18", [18]),
        ("18...", [18]),
        ("72 clips, altogether.", [72]),
        ("18kg, 3rd", [18, 3]),
        ("+7", [7]),
        ("007", [7]),
        ("1,00,000", [100_000]),  # as in India
        ("\uff11\uff18", [18]),  # the digits of Chinese keyboards
        ("18 m^2 of CO2, v2.5, x_1", [18]),
        ("18 m\u00b2", [18]),
        ("12,", [12]),
        (",", []),
        ("no number, -, $, .", []),
    ],
)
def test_what_stands_around_a_number(text, expected):
    assert values(text) == expected


@pytest.mark.parametrize(
    "text",
    ["1,23", "1,2345", "0,123", "3,4,5", "10:30", "1.2.3", "9/12/2024", "1.000,00", "1/0",
     "1e9999", "9" * 5000],
)  # fmt: skip
def test_digits_that_are_no_number_have_no_value(text):
    """Above all they are not read as another number, such as 3 for 1.2.3."""
    assert values(f"It is {text}.") == [None]


@pytest.mark.parametrize(
    "text", ["1" * 200_000, "1," * 100_000, "-$" * 100_000, "1.2" * 70_000, "1e" * 100_000]
)
def test_long_texts_take_no_time(text):
    start = time.perf_counter()
    numbers_in(plain(text))
    assert time.perf_counter() - start < 2
