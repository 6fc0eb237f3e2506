import pytest

from qwen_env.errors import UsageError
from qwen_env.rewards import WeightedSum


def ones(batch):
    return [1.0] * len(batch)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"a": 3}, "the term 'a' of a weighted sum is 3; it must be .weight, reward."),
        ({"a": (1, ones, 2)}, "the term 'a' of a weighted sum is"),
        ({"a": (1, "m:f")}, "the reward of 'a' in a weighted sum is 'm:f'; it must be a callable"),
        ({"a": (None, ones)}, "the weight of 'a' in a weighted sum is None"),
        ({"_a": (1, ones)}, "names a term '_a'; names must be printable text"),
        ({}, "needs at least one term"),
    ],
)
def test_wrong_terms(terms, message):
    with pytest.raises(UsageError, match=message):
        WeightedSum(terms)


def test_one_term_does_not_spoil_the_rows_of_the_next(make_batch):
    def stars(batch):
        return [row.pop("stars") for row in batch.rows]

    total, _ = WeightedSum({"once": (1, stars), "again": (2, stars)})(make_batch(["a"], stars=4))
    assert total.tolist() == [12]


def test_the_one_accuracy_is_the_sum_s(make_batch):
    def right(batch):
        return [1.0], {"accuracy": [1.0]}

    batch = make_batch(["a"])
    _, components = WeightedSum({"right": (0.9, right), "short": (0.1, ones)})(batch)
    assert components["accuracy"].tolist() == components["right/accuracy"].tolist() == [1]
    _, components = WeightedSum({"one": (0.9, right), "two": (0.1, right)})(batch)
    assert "accuracy" not in components, "which of the two?"
