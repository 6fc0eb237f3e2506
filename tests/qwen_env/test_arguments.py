import numpy as np
import pytest

from qwen_env.arguments import finite, integer, one_of, texts, token_ids
from qwen_env.errors import UsageError


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)])
def test_integers_of_every_kind(value):
    assert integer("n", value, at_least=3) == 3
    assert type(integer("n", value)) is int


@pytest.mark.parametrize("value", [3.0, "3", None, True, [3], np.float32(3), float("nan")])
def test_what_is_not_an_integer(value):
    with pytest.raises(UsageError, match=r"^n is .*; it must be an integer\.$"):
        integer("n", value)


def test_an_integer_that_is_too_small():
    with pytest.raises(UsageError, match=r"^n is 2; it must be at least 3"):
        integer("n", 2, at_least=3)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2)])
def test_numbers_of_every_kind(value):
    assert finite("x", value) == 2.0
    assert type(finite("x", value)) is float


@pytest.mark.parametrize("value", ["2", b"2", None, [2], float("nan"), -np.inf, 10**400])
def test_what_is_not_a_finite_number(value):
    with pytest.raises(UsageError, match=r"^x is .*; it must be a finite number\.$"):
        finite("x", value)


def test_choices():
    one_of("mode", "a", ("a", "b"))
    for wrong in ("c", None, ["a"], 3):
        with pytest.raises(UsageError, match=r"^mode is .*; it must be one of 'a', 'b'\.$"):
            one_of("mode", wrong, ("a", "b"))


@pytest.mark.parametrize(
    "ids", [[3, 1, 3], (1, 3), {1, 3}, np.array([3, 1]), iter([1, 3]), range(1, 4, 2)]
)
def test_token_ids_are_sorted_once(ids):
    assert token_ids("ids", ids) == (1, 3)


@pytest.mark.parametrize("one", [3, np.int32(3), np.array(3)])
def test_a_single_token_id(one):
    assert token_ids("ids", one) == (3,)


@pytest.mark.parametrize(
    "wrong",
    ["3", b"3", "<|im_end|>", ["3"], [2.5], 2.0, None, [None], [[3]], True, [3, True]],
)
def test_what_are_not_token_ids(wrong):
    with pytest.raises(UsageError, match=r"^ids is .*; it must be a list of token ids"):
        token_ids("ids", wrong)


@pytest.mark.parametrize("value", [["b", "a", "b"], ("b", "a"), iter("ba"), np.array(["b", "a"])])
def test_texts_keep_their_order_and_come_once(value):
    assert texts("stop", value) == ("b", "a")


def test_a_single_text_and_none_at_all():
    assert texts("stop", "ba") == ("ba",)
    assert texts("stop", []) == ()


@pytest.mark.parametrize("wrong", ["", [""], ["a", 3], b"a", [b"a"], 3, None, [["a"]]])
def test_what_are_not_texts(wrong):
    with pytest.raises(UsageError, match=r"^stop is .*; it must be text or a list of texts"):
        texts("stop", wrong)


def test_a_long_list_is_not_printed_whole():
    with pytest.raises(UsageError) as caught:
        token_ids("ids", [*range(10_000), "x"])
    assert len(str(caught.value)) < 200
