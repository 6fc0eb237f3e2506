"""95 % confidence intervals of what an evaluation measures.

What is drawn at random are the prompts: several responses to one of them say more about that prompt
and not about others. So every interval is over prompts, of one number each, however many responses
that number is the mean of.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95

_TAIL = (1 + CONFIDENCE) / 2
_Z = NormalDist().inv_cdf(_TAIL)

Interval = tuple[float, float]
"""Its lower and its upper end."""


def wilson_interval(share: float, count: float) -> Interval:
    """Wilson's interval of a probability, of which `share` of `count` independent trials came true.

        (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n),    z = 1.96

    It stays within [0, 1] and has a width where all trials ended alike (Wilson 1927,
    doi:10.1080/01621459.1927.10502953).

    Raises:
        ValueError: `share` is outside [0, 1], or `count` is not positive.
    """
    if not (0 <= share <= 1 and count > 0):
        raise ValueError(f"no share of trials: {share} of {count}")
    weight = _Z**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def share_interval(shares: Sequence[float] | np.ndarray, samples: int = 1) -> Interval:
    """The interval of the mean of one share in [0, 1] a prompt, each of `samples` responses.

    Wilson's, of as many independent trials as would have the variance that the shares of n prompts
    were seen to have, n p (1 - p) / s² (Korn and Graubard 1998). There are at least n of them: no
    shares of mean p vary more than zeros and ones. There are at most n · samples: a prompt's share
    varies at least as much as that of independent trials with probability p. Where all shares are 0
    or 1 it is Wilson's interval of n trials.

    Raises:
        ValueError: there are none, or one is outside [0, 1].
    """
    x = np.asarray(shares, np.float64)
    if not x.size or x.min() < 0 or x.max() > 1:
        raise ValueError("shares must be numbers between 0 and 1, at least one of them")
    n, mean = len(x), float(x.mean())
    variance = float(x.var(ddof=1)) if n > 1 else 0.0
    binomial = mean * (1 - mean)
    if binomial <= 0:  # all shares are 0, or all are 1
        return wilson_interval(mean, n)
    count = n * binomial / variance if variance > 0 else math.inf
    return wilson_interval(mean, min(max(count, n), n * samples))


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval | None:
    """The interval of the mean of one number a prompt: x̄ ± t(0.975, n - 1) s / √n.

    None for fewer than two numbers, whose spread nobody knows.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return None
    half = float(stdtrit(len(x) - 1, _TAIL) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()) - half, float(x.mean()) + half
