"""The distribution that tokens are drawn from, and that every log-probability belongs to.

Temperature, top-k and top-p make another distribution of the network's logits. A ratio of
probabilities means something only if old, new and reference policy are changed alike, so:

- the temperature divides the logits of all three;
- the ids that top-k and top-p left to the sampler, the token's *sampling mask*, are recorded with
  the rollout, and all three are normalised over that same set. Were each to choose a set of its
  own, a token drawn could have probability 0 under the policy that is being trained.

Shapes: N rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8


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

    Args:
        logits: tempered, forbidden ids at -inf.
    """
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    ranked = jax.lax.top_k(logits, k)[0]
    least = ranked[:, -1:]
    if sampling.top_p is not None and sampling.top_p < 1:  # the sum below is 1 up to rounding
        p = jax.nn.softmax(ranked, axis=-1)
        is_needed = jnp.cumsum(p, axis=-1) - p < sampling.top_p
        least = jnp.min(jnp.where(is_needed, ranked, jnp.inf), axis=-1, keepdims=True)
    return (logits >= least) & (logits > -jnp.inf)


def pack_bits(sampling_mask: Bool[Array, "*rows V"]) -> UInt8[Array, "*rows (V+7)//8"]:
    """Eight ids a byte."""
    return jnp.packbits(sampling_mask, axis=-1)


def unpack_bits(
    sampling_mask: UInt8[Array, "*rows bytes"], vocab_size: int
) -> Bool[Array, "*rows {vocab_size}"]:
    """The inverse of `pack_bits`."""
    return jnp.unpackbits(sampling_mask, axis=-1, count=vocab_size).astype(bool)
