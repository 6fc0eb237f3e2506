"""Intervals and verdicts from a handful of seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct as noncentral
from scipy.stats import t as student

CONFIDENCE = 0.95

Verdict = Literal["robust", "suggestive", "noise"]


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95 % confidence interval (NaN for one seed)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Student's t: x̄ ± t(0.975, n-1) s / √n."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return Interval(float(x.mean()), math.nan)
    quantile = student.ppf((1 + CONFIDENCE) / 2, len(x) - 1)
    return Interval(float(x.mean()), float(quantile * x.std(ddof=1) / math.sqrt(len(x))))


def detectable_effect(
    num_seeds: int, *, power: float = 0.8, alpha: float = 1 - CONFIDENCE
) -> float:
    """The difference that a paired t-test finds with probability `power`.

    In standard deviations of the differences: the δ at which a noncentral t with n - 1 degrees of
    freedom and noncentrality δ √n exceeds t(1 - α/2, n-1) with that probability.
    """
    limit, freedom = student.ppf(1 - alpha / 2, num_seeds - 1), num_seeds - 1

    def excess(effect: float) -> float:
        found = noncentral(freedom, effect * math.sqrt(num_seeds))
        return float(found.sf(limit) - power)  # the other tail is next to nothing

    return float(brentq(excess, 1e-6, 10.0))


def paired(
    values: Mapping[int, float], others: Mapping[int, float]
) -> tuple[Interval, float] | None:
    """The mean difference over the seeds that both have, and its two-sided p value.

    Args:
        values, others: by seed.

    Returns:
        None with fewer than two seeds in common. Equal differences of zero have p = 1.
    """
    seeds = sorted(values.keys() & others.keys())
    if len(seeds) < 2:
        return None
    differences = np.array([values[seed] - others[seed] for seed in seeds])
    spread = differences.std(ddof=1) / math.sqrt(len(seeds))
    mean = differences.mean()
    if spread == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = 2 * student.sf(abs(mean) / spread, len(seeds) - 1)
    return interval(differences.tolist()), float(p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): the i-th smallest of m, times m - i + 1.

    To call those below 0.05 real errs once or more with a probability of at most 0.05.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(raised, 1.0)
    return [float(p) for p in corrected]


def verdict(p: float, corrected: float) -> Verdict:
    """robust: stands after the correction; suggestive: the interval of this one excludes 0."""
    level = 1 - CONFIDENCE
    if corrected < level:
        return "robust"
    return "suggestive" if p < level else "noise"
