import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled

from qwen_env.rewards import RewardError, score


@pytest.fixture
def batch(make_batch):
    return make_batch(["a", "bb", "ccc"])


def answering(answer):
    def reward_under_test(batch):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return reward_under_test


@pytest.mark.parametrize(
    "answer", [[1, 2.5, -3], (np.array([1, 2.5, -3]), {}), np.float16([1, 2.5, -3])]
)
def test_answers_become_float32(batch, answer):
    scores = score(answering(answer), batch)
    assert scores.values.dtype == np.float32
    assert scores.values.tolist() == [1, 2.5, -3]
    assert scores.components == {}


def test_components_are_checked_too(batch):
    scores = score(answering(([1, 2, 3], {"length": [4, 5, 6]})), batch)
    assert scores.components["length"].tolist() == [4, 5, 6]
    with pytest.raises(RewardError, match=r"Component 'length' .*reward_under_test returned shape"):
        score(answering(([1, 2, 3], {"length": [4, 5]})), batch)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2], r"returned shape \(2,\) for a batch of 3"),
        (1.0, r"returned shape \(\)"),
        (np.ones((3, 1)), r"returned shape \(3, 1\)"),
        (["a", "b", "c"], "must return numbers"),
        (None, r"must return numbers|returned shape"),
        ([0.0, float("nan"), 0.0], "returned nan for row 1; rewards must be finite"),
        ([0.0, 0.0, float("inf")], "returned inf for row 2"),
        (KeyError("stars"), "raised KeyError: 'stars'"),
    ],
)
def test_nothing_is_trusted(batch, answer, message):
    with pytest.raises(RewardError, match=message) as caught:
        score(answering(answer), batch)
    assert "reward_under_test" in str(caught.value)


def test_a_missing_extra_stays_a_missing_extra(batch):
    with pytest.raises(DependencyNotInstalled):
        score(answering(DependencyNotInstalled("pip install it")), batch)
