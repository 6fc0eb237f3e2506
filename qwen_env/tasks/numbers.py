"""Numbers in text, exactly: what a grader of arithmetic compares.

A number may have a sign (a typographic minus too), a currency before it, thousands in groups,
decimals and an exponent, or be a fraction: "-$1,234.50", "$-5", ".5", "1e3", "3/4". Digits that
belong together but are no such number ("1,23", "10:30", "1.2.3", "9/12/2024") have no value. Digits
in a word ("v2", "CO2") or behind a caret ("m^2") belong to no number.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

_SIGN = "[-+\u2212\u2013]"  # hyphen, plus, minus, and the dash that is written for it
_COMMA = "[,\u00a0\u2009\u202f]"  # or a space at which no line breaks

# A sign behind a word or a bracket is a difference or a range. Digits behind others and a separator
# are the rest of a word.
_FOUND = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}%]){_SIGN})?(?:\\?[$€£¥]\s?(?P<inner>{_SIGN})?)?"
    rf"(?P<digits>(?:(?<![\w.])\.)?(?<![\w^])(?<!\d[.:/])(?<!\d{_COMMA})\d+(?:(?:{_COMMA}|[.:/])\d+)*"
    r"(?:[eE][-+\u2212]?\d+(?!\w))?)"
)
_DECIMAL = rf"(?:\d+|[1-9]\d{{0,2}}(?:{_COMMA}\d{{3}})+|[1-9]\d?(?:,\d\d)+,\d{{3}})?(?:\.\d+)?"
_NUMBER = re.compile(rf"({_DECIMAL}(?:[eE][-+]?\d{{1,3}})?)(?:/({_DECIMAL}))?")
_LONGEST = 1000  # characters; Python converts no more than 4,300 digits

_LATEX = (
    (re.compile(r"\{,\}|\\,(?=\d)"), ","),  # 1{,}000 and 1\,000
    (re.compile(r"\\!"), ""),  # 1,\!000
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
)


class Found(NamedTuple):
    """Digits that belong together, at text[start:end], and what they are worth, if anything."""

    start: int
    end: int
    value: Fraction | None


def numbers_in(text: str) -> Sequence[Found]:
    """All the numbers in `text`, in order; `plain` of a text that may hold LaTeX."""
    return [
        Found(match.start(), match.end(), _value(match["digits"], match["sign"], match["inner"]))
        for match in _FOUND.finditer(text)
    ]


def plain(text: str) -> str:
    """`text` with the numbers that LaTeX sets apart (1{,}000, \\frac{3}{4}) written as others."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _value(digits: str, *signs: str | None) -> Fraction | None:
    digits = digits.replace("\u2212", "-")
    match = _NUMBER.fullmatch(digits) if len(digits) <= _LONGEST else None
    if match is None:
        return None
    top, bottom = (re.sub(_COMMA, "", part or "1") for part in match.groups())
    try:
        value = Fraction(top) / Fraction(bottom)
    except (ValueError, ZeroDivisionError):
        return None
    return value if all(sign in (None, "+") for sign in signs) else -value
