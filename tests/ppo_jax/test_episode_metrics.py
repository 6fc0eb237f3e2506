"""Repetition of completions, by hand and by a counting of another kind."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.episode_metrics import repetition


def ids(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def test_by_hand() -> None:
    # 1-grams: 1 2 1 2 1 2 | 1 3: 3 of 8. 2-grams: 12 21 12 21 12 | 13: 3 of 6.
    # 4-grams: 1212 2121 1212: one of three stood there before.
    assert repetition(ids([1, 2, 1, 2, 1, 2], [1, 3])) == {
        "text/distinct_1": pytest.approx(3 / 8),
        "text/distinct_2": pytest.approx(3 / 6),
        "text/repeated_4": pytest.approx(1 / 3),
    }


def test_a_collapsed_batch_and_one_that_never_repeats() -> None:
    loop = repetition(ids(*[[7] * 20] * 8))
    assert loop["text/distinct_1"] == 1 / 160
    assert loop["text/distinct_2"] == 1 / 152
    assert loop["text/repeated_4"] == 16 / 17
    fresh = repetition(ids(*np.arange(160).reshape(8, 20).tolist()))
    assert fresh == {"text/distinct_1": 1.0, "text/distinct_2": 1.0, "text/repeated_4": 0.0}


def test_alike_completions_are_not_repeated_within_themselves() -> None:
    alike = repetition(ids(*[[1, 2, 3, 4, 5]] * 4))
    assert alike["text/distinct_1"] == 1 / 4
    assert alike["text/repeated_4"] == 0.0


@pytest.mark.parametrize("rows", [[], [[]], [[1]], [[1], [2, 3]]])
def test_too_short_for_a_gram(rows: list[list[int]]) -> None:
    result = repetition(ids(*rows))
    assert result["text/repeated_4"] == 0.0
    assert all(0.0 <= share <= 1.0 for share in result.values())


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5))
def test_agrees_with_counters(rows: list[list[int]]) -> None:
    def counts(row: list[int], n: int) -> Counter[str]:
        text = "".join(map(str, row))  # one digit an id
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    result = repetition(ids(*rows))
    for n in (1, 2):
        whole = sum((counts(row, n) for row in rows), Counter())
        assert result[f"text/distinct_{n}"] == pytest.approx(len(whole) / max(whole.total(), 1))
    each = [counts(row, 4) for row in rows]
    again = sum(count - 1 for counter in each for count in counter.values())
    total = sum(counter.total() for counter in each)
    assert result["text/repeated_4"] == pytest.approx(again / max(total, 1))
