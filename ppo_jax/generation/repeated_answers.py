"""What several answers to each prompt say: pass@k and maj@k, a number for each prompt."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at(k: int, right: np.ndarray, samples: int) -> np.ndarray:
    """The probability that at least one of k answers is right, for each prompt.

        pass@k = 1 - C(n - c, k) / C(n, k)

    for c right ones among n answers: the share of all choices of k among the n that hold a right
    one, which is an unbiased estimate (Chen et al. 2021, arXiv:2107.03374, section 2.1).

    Args:
        right: int [N], the right answers c among the n = `samples` answers to each prompt.

    Returns:
        float64 [N].

    Raises:
        ValueError: k is not among 1 ... n, or a count not among 0 ... n.
    """
    right = np.asarray(right)
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} answers")
    if right.size and not (right.min() >= 0 and right.max() <= samples):
        raise ValueError(f"right answers must be 0 to {samples} of {samples}")
    of_all = math.comb(samples, k)
    each = [1 - math.comb(samples - c, k) / of_all for c in range(samples + 1)]
    estimates: np.ndarray = np.array(each)[right]
    return estimates


def majority(answers: Sequence[Sequence[Hashable | None]], right: np.ndarray) -> np.ndarray:
    """How probably the answer that most responses give is right, for each prompt.

    Votes are counted over the k answers to a prompt; None is no vote, and a prompt without a vote
    has no right answer. Among answers with equally many votes one is drawn at random: the result is
    the expected value of that, and so depends on no order (Wang et al. 2023, arXiv:2203.11171).

    Args:
        answers: [N][k], the answers in a normal form.
        right: [N, k], 1 where an answer is right, otherwise 0. Where a grader does not treat alike
            answers alike, an answer counts as right as its responses are in the mean.

    Returns:
        float64 [N].
    """
    return np.array([_majority(given, marks) for given, marks in zip(answers, right, strict=True)])


def _majority(given: Sequence[Hashable | None], marks: np.ndarray) -> float:
    votes = Counter(answer for answer in given if answer is not None)
    most = max(votes.values(), default=0)
    elected = [answer for answer, count in votes.items() if count == most]
    # All have equally many votes, so their mean is that over all their responses.
    counted = [
        float(mark)
        for answer, mark in zip(given, marks, strict=True)
        if answer is not None and answer in elected
    ]
    return sum(counted) / len(counted) if counted else 0.0
