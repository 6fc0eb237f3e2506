import asyncio
import functools
import json
import operator
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled

from qwen_env.rewards import RewardError, WeightedSum, score


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


class TimedOut(BaseException):
    """As Math-Verify and func_timeout raise it, past every `except Exception`."""


class Unspeakable(Exception):
    def __str__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2], r"returned shape \(2,\) for a batch of 3; it must return one number per row"),
        (1.0, r"returned shape \(\)"),
        (np.ones((3, 1)), r"returned shape \(3, 1\)"),
        (None, "returned None; it must return one number per row"),
        (
            np.ma.array(NUMBERS, mask=[0, 1, 0]),
            "returned a masked value for row 1 .*must be finite",
        ),
        (
            np.array([(0.0,), (1.0,), (2.0,)], [("x", "f4")]),
            r"a ndarray \(of type \[\('x', '<f4'\)",
        ),
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
        (
            (NUMBERS, {"score": NUMBERS}),
            "names a component 'score'; names must be printable text, and none",
        ),
        ((NUMBERS, {"missing_eos_penalty": NUMBERS}), "names a component 'missing_eos_penalty'"),
        ((NUMBERS, {3: NUMBERS}), "names a component 3"),
        ((NUMBERS, {"_part": NUMBERS}), r"names a component '_part'; .* none of .*'_\.\.\.', whi"),
        ((NUMBERS, {"part": ["a", "b", "c"]}), "Component 'part' of .* returned 'a' for row 0"),
        (
            KeyError("stars"),
            r"raised KeyError: 'stars' \(.*test_base.py, line \d+\), for a batch of 3",
        ),
        (SystemExit(3), r"raised SystemExit: 3 \(.*test_base.py, line \d+\), for a batch of 3"),
        (TimedOut("5 s"), r"raised TimedOut: 5 s \(.*, for a batch of 3"),
        (TimedOut(), r"raised TimedOut \(.*, for a batch of 3"),
        (asyncio.CancelledError(), r"raised CancelledError \(.*, for a batch of 3"),
        (GeneratorExit(), r"raised GeneratorExit \(.*, for a batch of 3"),
        (Unspeakable(), r"raised Unspeakable \(.*, for a batch of 3"),
        (ValueError("x" * 10_000), r"raised ValueError: x{500} \.\.\. \("),
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
    with pytest.raises(RewardError, match=rf"^The reward function {name} returned None"):
        score(reward, batch)


def test_the_row_in_the_hands_of_the_code_that_failed_is_named(make_batch):
    calls = []

    def divides(batch):
        calls.append(batch)
        return [1 / len(text) for text in batch.completions]

    def looks_up(batch):
        calls.append(batch)
        scores = []
        for row, ids in zip(batch.rows, batch.completion_ids, strict=True):
            scores.append(row["answers"][len(ids)])
        return scores

    batch = make_batch(["ab", "cd", "", "ef"], answers={2: 1.0})
    for reward, error in ((divides, "ZeroDivisionError"), (looks_up, "KeyError: 0")):
        message = rf"{error}.*, for a batch of 4, it seems at row 2 \(prompt 'The film'\)\.$"
        with pytest.raises(RewardError, match=message):
            score(reward, batch)
    assert len(calls) == 2, "a call may cost money"


def test_no_row_is_named_where_none_or_several_were_in_hand(make_batch):
    def on_the_batch(batch):
        raise ValueError("too many")

    def on_two(batch):
        first, last = batch.completions[0], batch.completions[-1]
        return [first.index(last)] * len(batch)

    def on_equals(batch):  # equal texts may be one object
        for text in batch.completions:
            float(text)

    for reward in (on_the_batch, on_two):
        with pytest.raises(RewardError, match=r"for a batch of 3\.$"):
            score(reward, make_batch(["a", "b", "c"]))
    with pytest.raises(RewardError, match=r"for a batch of 3\.$"):
        score(on_equals, make_batch(["same"] * 3))


def test_the_line_that_raises_is_the_users_own(batch):
    def reward(batch):
        return [json.loads(text) for text in batch.completions]

    line = reward.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"JSONDecodeError: .* \({__file__}, line {line}\), for"):
        score(reward, batch)
    with pytest.raises(RewardError, match=r"raised TypeError: [^(]*, for"):
        score(operator.itemgetter(3), batch)  # no line of anybody's


@pytest.mark.parametrize(
    ("error", "count", "message"),
    [
        (TimeoutError("late"), 3, r"TimeoutError: late .*, for a batch of 3\.$"),
        (KeyError("stars"), 1, r"KeyError: 'stars' .*, for row 0 \(prompt 'The film'\)\.$"),
    ],
)
def test_it_is_called_once(make_batch, error, count, message):
    calls = []

    def reward(batch):
        calls.append(len(batch))
        raise error

    with pytest.raises(RewardError, match=message):
        score(reward, make_batch(["a"] * count))
    assert calls == [count]


def test_a_ctrl_c_stays_one(batch):
    """It comes from the process's handler of SIGINT; that of a training run raises nothing."""

    def interrupted(batch):
        signal.raise_signal(signal.SIGINT)

    def interrupts(*_):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.default_int_handler, interrupts):
            signal.signal(signal.SIGINT, handler)
            with pytest.raises(KeyboardInterrupt):
                score(interrupted, batch)
        for handler in (interrupts, lambda *_: None):
            signal.signal(signal.SIGINT, handler)
            with pytest.raises(RewardError, match="raised KeyboardInterrupt"):
                score(answering(KeyboardInterrupt()), batch)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with ThreadPoolExecutor() as pool, pytest.raises(RewardError, match="KeyboardInterrupt"):
            pool.submit(score, answering(KeyboardInterrupt()), batch).result()
    finally:
        signal.signal(signal.SIGINT, before)


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


def test_rows_are_copied_to_the_last_value(make_batch):
    def reward(batch):
        for row in batch.rows:
            row["messages"].append({"role": "assistant"})
            row["table"][...] = 7
            row["nested"]["a"][0].clear()
        return [len(row["messages"]) for row in batch.rows]

    shared = {"messages": [{"role": "user"}], "table": np.zeros(2), "nested": {"a": [{"b": 1}]}}
    batch = make_batch(["a", "b"], **shared)
    for _ in range(2):
        assert score(reward, batch).values.tolist() == [2, 2]
    assert shared["messages"] == [{"role": "user"}]
    assert shared["table"].tolist() == [0, 0]
    assert shared["nested"] == {"a": [{"b": 1}]}
    with pytest.raises(
        RewardError, match=r"^row 0 \(prompt .* cannot copy, .*: TypeError: cannot p"
    ):
        score(reward, make_batch(["a"], lock=threading.Lock()))


def test_an_asynchronous_reward_is_named_as_such(batch):
    async def reward(batch):
        return [0.0] * len(batch)

    with pytest.raises(RewardError, match=r"reward is asynchronous; .*, with asyncio\.run"):
        score(reward, batch)


def test_numpy_s_error_state_is_the_caller_s(batch):
    with np.errstate(all="raise"):
        assert score(answering([1e-300, 0.1, 0.2]), batch).values[0] == 0
        with pytest.raises(RewardError, match=r"returned 1e\+300 for row 0"):
            score(answering([1e300, 0.1, 0.2]), batch)


def test_arrays_of_other_libraries(batch):
    for ones in (torch.ones(3, dtype=torch.float16), jnp.ones(3, jnp.bfloat16)):
        assert score(answering(ones), batch).values.tolist() == [1, 1, 1]
    trained = torch.ones(3, requires_grad=True)
    with pytest.raises(RewardError, match=r"returned a Tensor \(.*requires grad.*\); it must"):
        score(answering(trained), batch)


def test_a_missing_extra_stays_a_missing_extra(batch):
    with pytest.raises(DependencyNotInstalled):
        score(answering(DependencyNotInstalled("pip install it")), batch)


class TestRewardsByToken:
    """A number for each token of an episode."""

    @pytest.fixture
    def batch(self, make_batch):
        return make_batch(["aaa", "b", "cc"])  # of so many tokens

    def test_they_are_kept_and_added_up(self, batch):
        rows = [[0.5, 0, -1.5], [2], [1, 1]]
        for given in (rows, [np.array(row) for row in rows], np.array(rows, dtype=object)):
            scores = score(lambda batch, given=given: (given, {"n": [1, 2, 3]}), batch)
            assert [row.tolist() for row in scores.tokens] == rows
            assert {row.dtype for row in scores.tokens} == {np.dtype(np.float32)}
            assert scores.values.tolist() == [-1, 2, 2]
            assert scores.components["n"].tolist() == [1, 2, 3]
        assert score(lambda batch: [1.0, 2.0, 3.0], batch).tokens is None

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                [[1, 2], [3], [4, 5]],
                r"returned 2 numbers for row 0 .* has 3 tokens; it must return",
            ),
            (
                [[1, 2, 3], [np.nan], [4, 5]],
                r"returned \[nan\] for row 1 .*; rewards must be finite",
            ),
            ([[1, 2, 3], ["x"], [4, 5]], r"returned \['x'\] for row 1"),
            ([[1, 2, 3], [1e60], [4, 5]], r"returned \[1e.60\] for row 1"),
            ([[1], [2], [3]], r"returned shape \(3, 1\) for a batch of 3"),
            ([[1, 2, 3], 3, [4, 5]], "must return one number per row"),
        ],
    )
    def test_wrong_ones_name_the_row(self, batch, rows, message):
        with pytest.raises(RewardError, match=message):
            score(lambda batch: rows, batch)

    def test_a_weighted_sum_gives_whole_rows_numbers_to_the_last_token(self, batch):
        terms = {
            "steps": (2.0, lambda batch: [[1, 2, 3], [4], [5, 6]]),
            "end": (1.0, lambda batch: [10, 20, 30]),
            "more": (1.0, lambda batch: [[0, 0, 1], [1], [1, 1]]),
        }
        scores = score(WeightedSum(terms), batch)
        assert [row.tolist() for row in scores.tokens] == [[2, 4, 17], [29], [11, 43]]
        assert scores.components["steps"].tolist() == [6, 4, 11]
