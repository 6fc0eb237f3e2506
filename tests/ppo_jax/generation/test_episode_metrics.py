"""Means and spreads of outcomes by hand; repetition by hand and by a counting of another kind."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.generation.actor import Experience
from ppo_jax.generation.episode_metrics import (
    component_means,
    evaluation_intervals,
    evaluation_means,
    gold_spread,
    is_right_or_wrong,
    length_counts,
    repeated_answers,
    repetition,
    sample_record,
    user_message,
)
from ppo_jax.generation.intervals import mean_interval, share_interval, wilson_interval
from qwen_env.episodes import Episode, Outcome
from qwen_env.prompts import Prompt


def ids(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def outcome(score: float, length: int, finish_reason: str, **components: float) -> Outcome:
    info = {
        "reward_components": {"score": score, **components},
        "completion": "e" * length,
        "completion_length": length,
        "finish_reason": finish_reason,
    }
    return Outcome(score, info)


OUTCOMES = [
    outcome(1.0, 1, "eos", gold=-3.0, style=0.5),
    outcome(2.0, 4, "length", gold=1.0, style=0.5),
    outcome(6.0, 4, "length", gold=5.0, style=2.0),
    outcome(-4.0, 2, "length", gold=5.0, style=0.0),
]


def episodes_of(outcomes: list[Outcome]) -> Experience:
    """Of which no arrays are looked at."""
    nothing: Any = None
    prompt = Prompt("So", np.array([9], np.int32), {}, 0)
    episodes = [
        Episode(prompt, np.zeros(o.info["completion_length"], np.int32), o.info["finish_reason"])
        for o in outcomes
    ]
    return Experience(nothing, episodes, outcomes, 0.0, 0.0)


def test_evaluation_means() -> None:
    assert evaluation_means(OUTCOMES) == {
        "score": 1.25,
        "gold": 2.0,
        "style": 0.75,
        "length_mean": 2.75,
        "eos_rate": 0.25,
    }
    assert component_means(OUTCOMES) == {"gold": 2.0, "style": 0.75}


def test_intervals_are_over_prompts() -> None:
    """Two responses to each of two prompts; of shares, none leaves [0, 1]."""
    intervals = evaluation_intervals(OUTCOMES, samples=2)
    assert intervals.keys() == evaluation_means(OUTCOMES).keys()
    assert intervals["score"] == mean_interval([1.5, 1.0])
    assert intervals["style"] == mean_interval([0.5, 1.0])
    assert intervals["length_mean"] == mean_interval([2.5, 3.0])
    assert intervals["eos_rate"] == share_interval([0.5, 0.0], 2)
    assert evaluation_intervals(OUTCOMES[:2], samples=2)["score"] is None, "of one prompt"


def test_a_score_that_is_the_accuracy_has_its_interval() -> None:
    wrong = [outcome(0.0, 1, "eos", accuracy=0.0, flexible_accuracy=0.0)] * 20
    for name in ("score", "accuracy", "flexible_accuracy"):
        assert evaluation_intervals(wrong)[name] == wilson_interval(0, 20)
    other = [outcome(0.1, 1, "eos", accuracy=0.0)] * 20
    assert evaluation_intervals(other)["score"] == pytest.approx((0.1, 0.1))


def test_what_several_answers_say() -> None:
    """By hand: one right answer of four, and three."""
    marks = [0, 0, 1, 0, 1, 1, 0, 1]
    outcomes = [outcome(0.5, i, "eos", accuracy=float(mark)) for i, mark in enumerate(marks)]
    assert is_right_or_wrong(outcomes)
    assert not is_right_or_wrong([*outcomes, outcome(1.0, 1, "eos", accuracy=0.5)])
    assert not is_right_or_wrong(OUTCOMES)
    shares = repeated_answers(outcomes, 4, None)
    assert list(shares) == ["mean@4", "pass@2", "pass@4"]
    np.testing.assert_allclose(shares["mean@4"], [1 / 4, 3 / 4])
    np.testing.assert_allclose(shares["pass@2"], [3 / 6, 1])
    np.testing.assert_allclose(shares["pass@4"], [1, 1])
    # The length of an answer stands for it: "", "e", "ee", "eee" are four answers with a vote each.
    voted = repeated_answers(outcomes, 4, len)  # type: ignore[arg-type]
    np.testing.assert_allclose(voted["maj@4"], [1 / 4, 3 / 4])
    alike = repeated_answers(outcomes, 4, lambda text: "e" if len(text) in (2, 6, 7) else None)
    np.testing.assert_allclose(alike["maj@4"], [1, 1 / 2])
    assert list(repeated_answers(outcomes, 8, None)) == ["mean@8", "pass@2", "pass@4", "pass@8"]
    assert list(repeated_answers(outcomes[:6], 3, None)) == ["mean@3", "pass@2", "pass@3"]


def test_the_spread_of_the_gold_score() -> None:
    """Its deviations are -5, -1, 3 and 3: 44 over four."""
    assert gold_spread(episodes_of(OUTCOMES)) == {"reward/gold_std": pytest.approx(11**0.5)}
    assert gold_spread(episodes_of([outcome(1.0, 1, "eos", style=0.5)])) == {}


def test_lengths_are_counted_from_one_token_to_the_limit() -> None:
    assert length_counts(episodes_of(OUTCOMES), limit=6).tolist() == [1, 1, 0, 2, 0, 0]
    assert length_counts(episodes_of(OUTCOMES), limit=4).tolist() == [1, 1, 0, 2]


def test_a_sample_says_what_the_episode_came_to() -> None:
    batch = episodes_of(OUTCOMES)
    assert sample_record(batch.episodes[1], batch.outcomes[1]) == {
        "prompt": "So",
        "completion": "eeee",
        "finish_reason": "length",
        "score": 2.0,
        "components": {"score": 2.0, "gold": 1.0, "style": 0.5},
    }


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


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "What is 2 + 2?"},
]


@pytest.mark.parametrize(
    ("row", "text", "expected"),
    [
        ({"messages": CHAT}, "<s>Be brief. Hello. Yes? What is 2 + 2?<a>", "What is 2 + 2?"),
        ({"prompt": "What is 2 + 2?"}, "<u>What is 2 + 2?<a>", "What is 2 + 2?"),
        ({"prompt": "The plot"}, "The plot", None),  # no chat: the prompt itself is shown
        ({"messages": CHAT}, "2 + 2?<a>", None),  # cut on its left
        ({"messages": CHAT[:1]}, "Be brief.", None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "x", None),
    ],
)
def test_what_the_user_says_last(row: dict[str, Any], text: str, expected: str | None) -> None:
    assert user_message(Prompt(text, np.array([1], np.int32), row, 0)) == expected
