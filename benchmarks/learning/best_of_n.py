"""What best-of-n is worth, in closed form."""

import math

import numpy as np
from scipy.special import gammaln


def best_of_n_weights(n: int, count: int) -> np.ndarray:
    """w [count], so that Σ w_i x_(i) is the mean of x over the winners of all n-subsets.

    x_(i) belongs to the sample with the i-th lowest score; it wins C(i-1, n-1) of the C(count, n)
    subsets.
    """
    rank = np.arange(1, count + 1)
    with np.errstate(divide="ignore"):
        log_weight = np.where(rank < n, -np.inf, _log_choose(rank - 1, n - 1))
    return np.exp(log_weight - _log_choose(count, n))


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n, in nats a response: what KL(best of n ‖ model) is at most.

    It is reached where no two responses have one score (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def _log_choose(n: np.ndarray | int, k: int) -> np.ndarray:
    return gammaln(np.add(n, 1)) - gammaln(k + 1) - gammaln(np.subtract(n, k - 1))
