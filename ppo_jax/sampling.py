"""The distribution that tokens are drawn from, and that every log-probability belongs to.

Temperature, top-k and top-p make another distribution of the network's logits, and this one is the
policy: what it is worth, how far it has moved and how far it is from the reference are all said of
it. So:

- the temperature divides the logits of the old, the new and the reference policy;
- the ids that top-k and top-p left to the sampler, the token's *sampling mask*, are recorded with
  the rollout, and the old and the new policy are normalised over that same set. Were each to choose
  a set of its own, a token drawn could have probability 0 under the policy that is being trained;
- the reference policy is normalised over all ids that the rules allow. Over the sampling mask it
  would agree with the policy about every id that was left out, however much it likes that id, and
  the KL divergence from it would not see what truncation does.

Shapes: N rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8


class Sampling(NamedTuple):
    """How tokens are drawn: tempered, then the k most probable, then the top p of those."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def is_truncated(self) -> bool:
        """Whether some ids that the rules allow are never drawn."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)


def sampling_logits(
    logits: Float[Array, "N V"], allowed: Bool[Array, "N V"], temperature: float
) -> Float[Array, "N V"]:
    """Tempered logits in float32, forbidden ids at -inf."""
    return jnp.where(allowed, logits.astype(jnp.float32) / temperature, -jnp.inf)


def truncation(logits: Float[Array, "N V"], sampling: Sampling) -> Bool[Array, "N V"]:
    """True for the ids that top-k and top-p keep.

    top-p keeps the fewest most probable ids whose probability, among the top k, reaches p. Ids
    that are exactly as probable as the last one kept are kept as well.

    The whole vocabulary is never sorted: of 8 x 151,936 logits that takes 0.27 s on a CPU core.

    Args:
        logits: tempered, forbidden ids at -inf.
    """
    kept = logits > -jnp.inf
    top_k, top_p = sampling.top_k, sampling.top_p or 1.0
    if top_k is not None and top_k < logits.shape[-1]:
        ranked = jax.lax.top_k(logits, top_k)[0]
        if top_p < 1:
            p = jax.nn.softmax(ranked, axis=-1)
            ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, jnp.inf)
        # The minimum, not the last: XLA replaces a slice of the top k by one of a full sort.
        kept &= logits >= ranked.min(axis=-1, keepdims=True)
    elif top_p < 1:
        p = jax.nn.softmax(logits, axis=-1)
        kept &= p >= _least_kept(p, top_p)
    return kept


def _least_kept(p: Float[Array, "N V"], mass: float) -> Float[Array, "N 1"]:
    """The greatest t such that the probabilities of at least t add up to `mass`; 0 if none do.

    Found bit by bit, from the highest: floats that are not negative are ordered as their bits are.
    """

    def with_next_bit(n: Array | int, bits: Int[Array, "N 1"]) -> Int[Array, "N 1"]:
        more = bits | (1 << (_BITS_OF_ONE - 1 - n))
        threshold = jax.lax.bitcast_convert_type(more, jnp.float32)
        reached = jnp.where(p >= threshold, p, 0.0).sum(axis=-1, keepdims=True)
        return jnp.where(reached >= mass, more, bits)

    nothing = jnp.zeros((p.shape[0], 1), jnp.int32)
    bits = jax.lax.fori_loop(0, _BITS_OF_ONE, with_next_bit, nothing)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


_BITS_OF_ONE = 30
"""How many of its lowest bits a float32 between 0 and 1 uses."""


def greatest(
    logits: Float[Array, "N V"], noise: Float[Array, "N V"] | float
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """Where logits + noise are greatest, and the log-probability there, softmax(logits)'s.

    A GPU and a TPU go over the logits once, in a reduction that makes the noise on the way, where
    the formula would read them from memory five times. A CPU computes such a reduction a number at
    a time.
    """
    noise = jnp.broadcast_to(noise, logits.shape)
    token, logprob = jax.lax.platform_dependent(
        logits, noise, cpu=_greatest_by_formula, default=_greatest_in_one_pass
    )
    return token, logprob


def _greatest_by_formula(logits: Array, noise: Array) -> tuple[Array, Array]:
    token = argmax(logits + noise)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _greatest_in_one_pass(logits: Array, noise: Array) -> tuple[Array, Array]:
    """With the sum of exp(logits) over that of the greatest so far, as it is summed online."""
    count = logits.shape[-1]

    def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        (noisy_a, place_a, logit_a, top_a, sum_a), (noisy_b, place_b, logit_b, top_b, sum_b) = a, b
        is_a = (noisy_a > noisy_b) | ((noisy_a == noisy_b) & (place_a < place_b))
        top = jnp.maximum(top_a, top_b)

        def rescaled(part: Array, its_top: Array) -> Array:
            return part * jnp.where(its_top == top, 1.0, jnp.exp(its_top - top))  # -inf = -inf

        return (
            jnp.where(is_a, noisy_a, noisy_b),
            jnp.where(is_a, place_a, place_b),
            jnp.where(is_a, logit_a, logit_b),
            top,
            rescaled(sum_a, top_a) + rescaled(sum_b, top_b),
        )

    place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    least = np.float32(-np.inf)
    _, token, chosen, top, total = jax.lax.reduce(
        (logits + noise, place, logits, logits, (logits > least).astype(jnp.float32)),
        (least, np.int32(count), least, least, np.float32(0)),
        merge,
        (1,),
    )
    return jnp.minimum(token, count - 1), chosen - top - jnp.log(total)


def argmax(x: Float[Array, "N V"]) -> Int[Array, "N"]:
    """The first place of each row's greatest number.

    As two reductions: XLA:CPU computes `jnp.argmax`, and the noise that it fuses into it, a number
    at a time, which took a tenth of the time of generation for 32 rows.
    """
    count = x.shape[-1]
    is_greatest = x == x.max(axis=-1, keepdims=True)
    first = jnp.where(is_greatest, jnp.arange(count, dtype=jnp.int32), count).min(axis=-1)
    return jnp.minimum(first, count - 1)  # of a row with NaN, some place


def pack_bits(sampling_mask: Bool[Array, "*rows V"]) -> UInt8[Array, "*rows (V+7)//8"]:
    """Eight ids a byte."""
    return jnp.packbits(sampling_mask, axis=-1)


def unpack_bits(
    sampling_mask: UInt8[Array, "*rows bytes"], vocab_size: int
) -> Bool[Array, "*rows {vocab_size}"]:
    """The inverse of `pack_bits`."""
    return jnp.unpackbits(sampling_mask, axis=-1, count=vocab_size).astype(bool)
