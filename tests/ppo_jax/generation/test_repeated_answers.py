"""pass@k by looking at every choice of k answers; votes by drawing among the winners."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.generation.repeated_answers import majority, pass_at


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(samples: int) -> None:
    for k in range(1, samples + 1):
        expected = []
        for count in range(samples + 1):
            is_right = [i < count for i in range(samples)]
            choices = list(itertools.combinations(is_right, k))
            expected.append(np.mean([any(choice) for choice in choices]))
        np.testing.assert_allclose(pass_at(k, np.arange(samples + 1), samples), expected)


def test_pass_at_k_of_chen_et_al() -> None:
    """Their own code: 1 - Π (1 - k / i) for i = n - c + 1 ... n; and it does not overflow."""
    n, k = 1000, 100
    for count in (1, 30, 900, 901):
        paper = 1.0 if n - count < k else 1 - np.prod(1 - k / np.arange(n - count + 1, n + 1))
        assert pass_at(k, np.array([count]), n)[0] == pytest.approx(paper)


def test_pass_at_1_is_the_mean_and_pass_at_n_is_any() -> None:
    right = np.array([0, 1, 3, 4])
    np.testing.assert_allclose(pass_at(1, right, 4), right / 4)
    np.testing.assert_array_equal(pass_at(4, right, 4), [0, 1, 1, 1])


@pytest.mark.parametrize(("k", "right"), [(0, 1), (5, 1), (2, 5), (2, -1)])
def test_what_cannot_be_estimated(k: int, right: int) -> None:
    with pytest.raises(ValueError, match="answers"):
        pass_at(k, np.array([right]), 4)


def test_votes_by_hand() -> None:
    answers = [
        ["7", "7", "8", None],  # 7 has most votes, and is right
        ["7", "8", "8", "8"],  # 8 has, and is wrong
        ["7", "7", "8", "8"],  # a tie: right in one draw of two
        ["7", "8", "9", None],  # in one of three
        [None, None, "7", None],  # one vote decides
        [None, None, None, None],  # nobody votes
    ]
    right = np.array([[answer == "7" for answer in row] for row in answers])
    np.testing.assert_allclose(majority(answers, right), [1, 0, 1 / 2, 1 / 3, 1, 0])


def test_alike_answers_that_were_graded_differently() -> None:
    assert majority([["7", "7", "7", "8"]], np.array([[1, 0, 0, 1]]))[0] == pytest.approx(1 / 3)


rows = st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=7)


@given(rows, st.randoms(use_true_random=False))
def test_votes_against_all_winners(given_answers: list[str | None], random: object) -> None:
    def expected(row: list[str | None]) -> float:
        valid = [answer for answer in row if answer is not None]
        if not valid:
            return 0.0
        most = max(valid.count(answer) for answer in valid)
        winners = sorted({answer for answer in valid if valid.count(answer) == most})
        return float(np.mean([winner == "a" for winner in winners]))

    right = np.array([[answer == "a" for answer in given_answers]])
    assert majority([given_answers], right)[0] == pytest.approx(expected(given_answers))
    shuffled = list(given_answers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    right = np.array([[answer == "a" for answer in shuffled]])
    assert majority([shuffled], right)[0] == pytest.approx(expected(given_answers))
