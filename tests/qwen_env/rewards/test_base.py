import functools
import json
import operator

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled

from qwen_env.rewards import RewardError, score


@pytest.fixture
def batch(make_batch):
    return make_batch(["a", "bb", "ccc"])


def answering(answer):
    def reward_under_test(batch):
        if isinstance(answer, BaseException):
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


NUMBERS = [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2], r"returned shape \(2,\) for a batch of 3; it must return one number per row"),
        (1.0, r"returned shape \(\)"),
        (np.ones((3, 1)), r"returned shape \(3, 1\)"),
        (None, r"returned shape \(\)"),
        (
            ["1", "2", "3"],
            r"returned '1' for row 0 \(prompt 'The film'\); it must return one number",
        ),
        ([0.0, "b", 2.0], "returned 'b' for row 1"),
        (np.array([0.0, "1.5", 2.0], object), "returned '1.5' for row 1 .*; it must return one"),
        ([0.0, 1.0, [2.0]], r"returned \[2.0\] for row 2"),
        ([0.0, object(), 2.0], "returned <object .* for row 1"),
        (
            np.array(["2020-01-01"] * 3, "M8[D]"),
            r"a ndarray \(of type datetime64\[D\]\)",
        ),
        ([1j, 2j, 3j], "returned 1j for row 0"),
        ({0: 1.0}, "returned a dict"),
        ((x for x in NUMBERS), "returned a generator"),
        ([0.0, float("nan"), 0.0], r"returned nan for row 1 \(prompt 'The film'\); .* be finite"),
        ([0.0, None, 0.0], "returned None for row 1"),
        ([0.0, 0.0, float("inf")], "returned inf for row 2"),
        ([1e300, 0.0, 0.0], r"returned 1e\+300 for row 0"),
        ([10**400, 0, 0], r"returned a list \(int too large .*\); it must return one num"),
        ((NUMBERS, None), "returned a tuple of list, NoneType; it must return an array, or"),
        ((NUMBERS, [("a", NUMBERS)]), "returned a tuple of list, list"),
        ((1.0, 2.0, 3.0), "returned a tuple of float, float, float"),
        ((1.0,), "returned a tuple of float"),
        ((NUMBERS, {"score": NUMBERS}), "names a component 'score'; names must be text, and none"),
        ((NUMBERS, {"missing_eos_penalty": NUMBERS}), "names a component 'missing_eos_penalty'"),
        ((NUMBERS, {3: NUMBERS}), "names a component 3"),
        ((NUMBERS, {"_part": NUMBERS}), r"names a component '_part'; .* none of .*'_\.\.\.', whi"),
        ((NUMBERS, {"part": ["a", "b", "c"]}), "Component 'part' of .* returned 'a' for row 0"),
        (KeyError("stars"), r"raised KeyError: 'stars' \(.*test_base.py, line \d+\), for row 0"),
        (SystemExit(3), r"raised SystemExit: 3 \(.*test_base.py, line \d+\), for row 0"),
    ],
)
def test_nothing_is_trusted(batch, answer, message):
    with pytest.raises(RewardError, match=message) as caught:
        score(answering(answer), batch)
    assert "reward_under_test" in str(caught.value)
    assert str(caught.value).endswith(".")


class Silent:
    def __call__(self, batch):
        return None


class Named(Silent):
    def __init__(self):
        self.__qualname__ = "hf:some/model"


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (Silent(), f"{__name__}.Silent"),
        (Named(), "hf:some/model"),
        (functools.partial(Silent.__call__, None), "functools.partial"),
    ],
)
def test_the_name_in_messages(batch, reward, name):
    with pytest.raises(RewardError, match=rf"^The reward function {name} returned shape"):
        score(reward, batch)


def test_the_row_that_makes_it_raise_is_named(make_batch):
    def reward(batch):
        return [1 / len(text) for text in batch.completions]

    with pytest.raises(RewardError, match=r"raised ZeroDivisionError: .*, for row 2 \(prompt 'The"):
        score(reward, make_batch(["a", "b", "", "d"]))


def test_the_line_that_raises_is_the_users_own(batch):
    def reward(batch):
        return [json.loads(text) for text in batch.completions]

    line = reward.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"JSONDecodeError: .* \({__file__}, line {line}\), for"):
        score(reward, batch)
    with pytest.raises(RewardError, match=r"raised TypeError: [^(]*, for"):
        score(operator.itemgetter(3), batch)  # no line of anybody's


def test_no_row_is_blamed_for_what_the_batch_does(make_batch):
    def reward(batch):
        if len(batch) > 2:
            raise RuntimeError("too many")
        return [0.0] * len(batch)

    with pytest.raises(RewardError, match="a batch of 3, of which no row fails on its own"):
        score(reward, make_batch(["a", "b", "c"]))


@pytest.mark.parametrize(
    ("error", "count", "message"),
    [
        (TimeoutError("late"), 3, r"TimeoutError: late .*, for a batch of 3\.$"),
        (MemoryError("too many"), 3, r"MemoryError: too many .*, for a batch of 3\.$"),
        (KeyError("stars"), 1, r"KeyError: 'stars' .*, for row 0 \(prompt 'The film'\)\.$"),
        (TimeoutError("late"), 1, r"TimeoutError: late .*, for row 0"),
    ],
)
def test_it_is_not_called_again_where_that_would_tell_nothing(make_batch, error, count, message):
    calls = []

    def reward(batch):
        calls.append(len(batch))
        raise error

    with pytest.raises(RewardError, match=message):
        score(reward, make_batch(["a"] * count))
    assert calls == [count]


def test_a_reward_may_do_what_it_likes_with_its_batch(batch):
    def reward(batch):
        answers = [row.pop("prompt") for row in batch.rows]
        for ids in (*batch.prompt_ids, *batch.completion_ids):
            ids[...] = 7
        for column in vars(batch).values():
            column.clear()
        return [len(answer) for answer in answers]

    for _ in range(2):
        assert score(reward, batch).values.tolist() == [8, 8, 8]
    assert batch.completion_ids[2].tolist() == [0, 1, 2]


def test_a_batch_of_one_row(batch):
    row = batch.row(1)
    assert (len(row), row.completions, row.prompts) == (1, ["bb"], ["The film"])
    assert row.completion_ids[0].tolist() == [0, 1]


def test_arrays_of_other_libraries(batch):
    for ones in (torch.ones(3, dtype=torch.float16), jnp.ones(3, jnp.bfloat16)):
        assert score(answering(ones), batch).values.tolist() == [1, 1, 1]
    trained = torch.ones(3, requires_grad=True)
    with pytest.raises(RewardError, match=r"returned a Tensor \(.*requires grad.*\); it must"):
        score(answering(trained), batch)


def test_a_missing_extra_stays_a_missing_extra(batch):
    with pytest.raises(DependencyNotInstalled):
        score(answering(DependencyNotInstalled("pip install it")), batch)
