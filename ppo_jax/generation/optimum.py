"""The best that any policy can earn for its KL from the reference, from samples of the reference.

Of all policies with one KL(π ‖ ref), the one that earns most is ref tilted by the reward,

    π*(y | x) ∝ ref(y | x) exp(r(x, y) / β)

(Korbak et al. 2022, arXiv:2205.11275; Rafailov et al. 2023, arXiv:2305.18290, eq. 4), which is also
what maximises r - β KL. Samples of ref, weighted by exp(r / β), are samples of π*.

Shapes: N prompts, n samples of each.
"""

from typing import NamedTuple

import numpy as np


class Optimum(NamedTuple):
    """π* of one β, estimated."""

    beta: float
    kl: float  # KL(π* ‖ ref), nats a response
    reward: float
    others: dict[str, float]  # means under π* of what was measured beside the reward
    effective_samples: float  # of the n, (Σ w)² / Σ w²: where few are left, nothing is known

    def objective(self) -> float:
        """r - β KL, of which there is no more."""
        return self.reward - self.beta * self.kl


def optimum(
    rewards: np.ndarray, beta: float, others: dict[str, np.ndarray] | None = None
) -> Optimum:
    """The best policy for a KL coefficient, with the samples' weights normalised for each prompt.

    Its KL can be told up to log n, which one sample of n alone would have.

    Args:
        rewards: float [N, n].
        beta: the KL coefficient, above 0.
        others: float [N, n] each, such as a gold reward.
    """
    tilt = (rewards - rewards.max(axis=1, keepdims=True)).astype(np.float64) / beta
    weights = np.exp(tilt)
    weights /= weights.sum(axis=1, keepdims=True)
    log_ratio = np.log(np.maximum(weights * rewards.shape[1], 1e-300))

    def mean(x: np.ndarray) -> float:
        return float((weights * x).sum(axis=1).mean())

    return Optimum(
        beta,
        mean(log_ratio),
        mean(rewards),
        {name: mean(x) for name, x in (others or {}).items()},
        float((1 / np.square(weights).sum(axis=1)).mean()),
    )


def optimum_at(
    kl: float, rewards: np.ndarray, others: dict[str, np.ndarray] | None = None
) -> Optimum:
    """The best policy at a KL from the reference, in nats a response.

    Raises:
        ValueError: no β reaches that KL with these samples.
    """
    # In units of the rewards' spread, since KL depends on r / β alone.
    spread = float(rewards.max(axis=1).mean() - rewards.min(axis=1).mean())
    low, high = 1e-4 * spread, 1e4 * spread  # of β; KL falls as it grows
    if spread == 0 or not optimum(rewards, high).kl <= kl <= optimum(rewards, low).kl:
        raise ValueError(f"a KL of {kl} nats cannot be told from {rewards.shape[1]} samples")
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if optimum(rewards, middle).kl > kl else (low, middle)
    return optimum(rewards, high, others)


def share_of_gain(reward: float, best: float, reference: float) -> float:
    """How much of what could be gained over the reference was gained."""
    return (reward - reference) / (best - reference)
