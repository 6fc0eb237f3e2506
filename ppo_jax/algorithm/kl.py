"""Estimates of a Kullback-Leibler divergence from the log-probabilities of sampled actions.

KL(p‖q) = E_p[log p - log q] sums over the whole vocabulary; the sampled token alone gives an
estimate. k1, k2 and k3 are from John Schulman's note "Approximating KL Divergence" (2020,
http://joschu.net/blog/kl-approx.html).
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Real, Shaped

from ppo_jax.algorithm.masking import AnyArray, Scalar, masked_mean, zero_invalid

KlEstimator = Literal["k1", "k2", "k3", "reference"]

MAX_EXPONENT = 10.0
"""What log q - log p is clamped to before it is exponentiated: e¹⁰ is 22,026."""


def kl_estimate(
    log_p: Real[AnyArray, "*shape"] | float,
    log_q: Real[AnyArray, "*shape"] | float,
    estimator: KlEstimator,
) -> Float[Array, "*shape"]:
    """One estimate of KL(p‖q) for every action, each drawn from p. With k1 = log p - log q:

        "k1"         k1                     unbiased; negative as often as not
        "k2"         k1² / 2                biased, low variance, never negative
        "k3"         exp(-k1) - 1 + k1      unbiased, low variance, never negative
        "reference"  k1 · exp(-k1)          has expectation -KL(q‖p): kept for comparison

    The last is what the reference algorithm calls its approximate KL, (old - new) · ratio. The
    ratio turns the expectation under p = old into one under q = new, where log p - log q averages
    to minus a KL: it is never expected to exceed a positive target.

    exp(-k1) explodes for an action that q likes and that p all but never chooses, so there -k1 is
    clamped to `MAX_EXPONENT` (verl and OpenRLHF clamp k3 itself, to 10). The other side is left
    alone: k3 grows no faster there than k1.

    k3 is unbiased where p may choose all that q may. If p is truncated by top-k or top-p and q is
    not, exp(-k1) averages to what q gives to the ids that p may choose, say Q, instead of to 1, and
    k3 falls short of KL(p‖q) by 1 - Q; k1 does not.

    Args:
        log_p: log-probability of the action under the distribution that it was drawn from.
        log_q: its log-probability under the other one.

    Raises:
        ValueError: `estimator` has another name.
    """
    k1 = jnp.asarray(log_p, jnp.float32) - jnp.asarray(log_q, jnp.float32)
    match estimator:
        case "k1":
            return k1
        case "k2":
            return jnp.square(k1) / 2
        case "k3":
            k1 = jnp.maximum(k1, -MAX_EXPONENT)
            return jnp.expm1(-k1) + k1
        case "reference":
            k1 = jnp.maximum(k1, -MAX_EXPONENT)
            return k1 * jnp.exp(-k1)
    raise ValueError(
        f"There is no KL estimator {estimator!r}; choose one of {', '.join(get_args(KlEstimator))}."
    )


def is_clamped(
    log_p: Real[AnyArray, "*shape"], log_q: Real[AnyArray, "*shape"], estimator: KlEstimator
) -> Bool[Array, "*shape"]:
    """Whether `kl_estimate` clamps an exponent."""
    exponentiates = estimator in ("k3", "reference")
    return exponentiates & (jnp.asarray(log_q) - jnp.asarray(log_p) > MAX_EXPONENT)


def approx_kl(
    old_logprobs: Real[AnyArray, "*shape"],
    new_logprobs: Real[AnyArray, "*shape"],
    mask: Shaped[AnyArray, "*shape"],
    estimator: KlEstimator = "k3",
    *,
    weights: Real[AnyArray, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Mean estimate of KL(old‖new) a token, in nats, over the valid actions drawn from `old`.

    Args:
        old_logprobs: log-probabilities of the actions under the policy that chose them.
        new_logprobs: the same under the policy as it is now.
        mask: True where an action is real.
        estimator: see `kl_estimate`.
        weights: see `masked_mean`.
    """
    old, new = zero_invalid(old_logprobs, mask), zero_invalid(new_logprobs, mask)
    return masked_mean(kl_estimate(old, new, estimator), mask, weights=weights)


def adapted_kl_coef(
    kl_coef: Scalar,
    kl: Scalar,
    *,
    target: Scalar,
    num_episodes: Scalar,
    horizon: Scalar,
) -> Float[Array, ""]:
    """The KL penalty's coefficient after a batch, moved towards holding `kl` at `target`:

        e = clip(kl / target - 1, -0.2, 0.2)          β ← β (1 + e · num_episodes / horizon)

    (Ziegler et al. 2019, arXiv:1909.08593, section 2.2.)

    Args:
        kl_coef: β until now.
        kl: mean KL(policy‖reference) of the batch, nats a response.
        target: nats a response.
        num_episodes: in the batch.
        horizon: episodes over which β moves by a factor of about e^0.2 at most.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return jnp.asarray(kl_coef) * (1 + error * num_episodes / horizon)
