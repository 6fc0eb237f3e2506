"""What PPO begins with: cross-entropy for a policy, Bradley and Terry's model for a reward.

As in `losses`, losses are means or, given `weights`, sums of which the parts of a batch add up to
the whole's.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Real, Shaped

from ppo_jax.algorithm.masking import AnyArray, Scalar, masked_mean


def cross_entropy(
    logprobs: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    *,
    weights: Real[AnyArray, "*shape"] | None = None,
) -> Float[Array, ""]:
    """-mean log p(token), in nats, over the tokens that are learnt.

    Args:
        logprobs: of each token under the model, given those before it.
        mask: True where a token is learnt.
        weights: of the tokens, instead of 1 / Σ mask each.
    """
    return -masked_mean(logprobs, mask, weights=weights)


def bradley_terry_loss(
    chosen: Real[AnyArray, "N"],
    rejected: Real[AnyArray, "N"],
    *,
    margin: Scalar | Real[AnyArray, "N"] = 0.0,
    centring_coef: Scalar = 0.0,
    weights: Real[AnyArray, "N"] | None = None,
) -> Float[Array, ""]:
    """The mean over pairs, with the scores r⁺ of the chosen and r⁻ of the rejected, of

        -log σ(r⁺ - r⁻ - m) + c (r⁺ + r⁻)²

    A margin m asks more of pairs whose difference was clear (arXiv:2307.09288, eq. 2). Pairs tell
    nothing of the scores' mean, which the second term (arXiv:2312.09244, section 3) keeps near 0.

    Args:
        chosen: r⁺.
        rejected: r⁻.
        margin: m, at least 0.
        centring_coef: c.
        weights: of the pairs, instead of 1 / N each.
    """
    chex.assert_equal_shape([chosen, rejected])
    chosen, rejected = jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32)
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
    losses += centring_coef * jnp.square(chosen + rejected)
    return masked_mean(losses, jnp.ones(losses.shape, bool), weights=weights)


def calibration_error(
    chosen: Float[np.ndarray, "N"], rejected: Float[np.ndarray, "N"], num_bins: int = 10
) -> float:
    """Expected calibration error (arXiv:1706.04599, eq. 3) of scores on pairs; on the host.

    By the scores, one of a pair is the better with probability max(p, 1-p), p = σ(r⁺ - r⁻). Pairs
    are put into bins of that confidence, from 1/2 to 1; the error is the mean over pairs of
    |share of the bin's pairs that the scores order right - mean confidence of the bin|. Equal
    scores are right half of the time.
    """
    gap = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    is_right = np.where(gap == 0, 0.5, gap > 0)
    place = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    excess = np.bincount(place, weights=is_right - confidence, minlength=num_bins)
    return float(np.abs(excess).sum() / len(gap))


def centred_head(
    weight: Float[np.ndarray, "D"], hidden: Float[np.ndarray, "N D"], ridge: float = 1e-3
) -> Float[np.ndarray, "D"]:
    """A head w' whose scores w'·h of N reference samples have mean 0 and standard deviation 1.

    A head without a bias is shifted along a direction u in which all samples are about as far:
    u minimises |Hu - 1|² + λ|u|², and w' = (w - μ u / mean(Hu)) / σ'. So the mean is 0 to the last
    digit, and gaps between scores change, but for the scale, only as far as Hu differs from 1.

    Args:
        weight: w.
        hidden: H, what the head reads of each sample.
        ridge: λ, as a share of the mean of the squares in H times N.

    Raises:
        ValueError: the samples all have one score, so no scale gives them a standard deviation.
    """
    w, h = np.asarray(weight, np.float64), np.asarray(hidden, np.float64)
    squares = h.T @ h
    penalty = ridge * np.trace(squares) / len(w) * np.eye(len(w))
    level = np.linalg.solve(squares + penalty, h.sum(axis=0))
    shifted = w - (h @ w).mean() / (h @ level).mean() * level
    std = (h @ shifted).std()
    if not std > 1e-6 * np.abs(h @ w).max():
        raise ValueError("All reference samples have one score, which no scale spreads.")
    return np.asarray(shifted / std, np.float32)
