"""Log-probabilities and entropies of tokens, from hidden states, for a vocabulary of any size.

With V = 151,936 the logits of a whole batch are what runs people out of memory. They are made for a
chunk of positions at a time, and made again for the gradient, which is written out here: left to
itself, JAX goes over arrays of logits about three times as often, and multiplies by float32
gradients of them where hidden states are in bfloat16.

Shapes: C chunks, N positions (of all, or of a chunk), V vocabulary, D hidden.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from ppo_jax.models.decoder import project
from ppo_jax.sampling import sampling_logits, unpack_bits
from qwen_env import mdp

LOGITS_AT_ONCE = 2**25
"""How many may exist at one time: so many (128 MiB) or, if those are more, D rows.

With fewer rows in a chunk, reading the projection and adding up its gradient takes longer than
the logits themselves.
"""


class ChosenTokens(NamedTuple):
    """Tokens, and what tells the ids that each was drawn from."""

    token: Int[Array, "N"]
    step: Int[Array, "N"]  # its number in the response: the rules allow some ids later than others
    sampling_mask: UInt8[Array, "N V/8"] | None  # what top-k and top-p left, if they are in use


def logprobs_and_entropy(
    hidden: Float[Array, "N D"],
    projection: Float[Array, "V D"],
    chosen: ChosenTokens,
    is_response: Bool[Array, "N"],
    *,
    rules: mdp.Rules,
    temperature: float,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """log p(token) and H(p) of the sampling distribution p at each hidden state, in float32.

    Args:
        is_response: where there is a token; chunks without any are left out, and give 0.
    """
    count = hidden.shape[0]
    num_chunks = -(-count // max(LOGITS_AT_ONCE // rules.vocab_size, hidden.shape[1]))
    chunk = -(-count // num_chunks)
    order = jnp.argsort(~is_response)  # stable: those with a token first
    # Beyond the end, edge values: a row of zeros would be a token that was drawn from no ids.
    taken = order[jnp.minimum(jnp.arange(num_chunks * chunk), count - 1)]
    chunks = jax.tree.map(
        lambda x: x[taken].reshape(num_chunks, chunk, *x.shape[1:]), (hidden, chosen)
    )
    num_needed = -(-is_response.sum() // chunk)
    results = _of_chunks(rules, temperature, projection, num_needed, *chunks)
    logprob, entropy = (jnp.zeros(count).at[order].set(x.reshape(-1)[:count]) for x in results)
    return logprob, entropy


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_chunks(
    rules: mdp.Rules,
    temperature: float,
    projection: Float[Array, "V D"],
    num_needed: Int[Array, ""],  # of the C chunks, the first ones
    hidden: Float[Array, "C N D"],
    chosen: ChosenTokens,
) -> tuple[Float[Array, "C N"], Float[Array, "C N"]]:
    return _forward(rules, temperature, projection, num_needed, hidden, chosen)[0]


def _forward(
    rules: mdp.Rules,
    temperature: float,
    projection: Array,
    num_needed: Array,
    hidden: Array,
    chosen: ChosenTokens,
) -> tuple[tuple[Array, Array], Any]:
    narrow = projection.astype(hidden.dtype)

    def of_chunk(i: Array | int) -> tuple[Statistics, Array]:
        chosen_here = _at(i, chosen)
        logits = _logits(hidden[i], narrow, chosen_here, rules, temperature)
        return _statistics(logits, chosen_here.token), logits

    def body(i: Array, statistics: Statistics) -> Statistics:
        pairs = zip(statistics, of_chunk(i)[0], strict=True)
        return Statistics(*(all.at[i].set(x) for all, x in pairs))

    if hidden.shape[0] == 1:  # the only chunk's logits are kept for the gradient
        alone, logits = of_chunk(0)
        statistics = Statistics(*(x[None] for x in alone))
    else:
        nothing = Statistics(*(jnp.zeros(chosen.token.shape),) * 3)
        statistics, logits = jax.lax.fori_loop(0, num_needed, body, nothing), None
    kept = projection, num_needed, hidden, chosen, statistics, logits
    return (statistics.logprob, statistics.entropy), kept


def _backward(
    rules: mdp.Rules, temperature: float, kept: Any, cotangents: tuple[Array, Array]
) -> tuple[Array, None, Array, None]:
    projection, num_needed, hidden, chosen, statistics, logits = kept
    narrow = projection.astype(hidden.dtype)

    def gradients(i: Array | int, logits: Array | None) -> tuple[Array, Array]:
        of_chunk = _at(i, chosen)
        if logits is None:
            logits = _logits(hidden[i], narrow, of_chunk, rules, temperature)
        d_logits = _logits_gradient(logits, of_chunk.token, _at(i, statistics), *_at(i, cotangents))
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        return (
            jnp.einsum("nv,vd->nd", d_logits, narrow),
            jnp.einsum("nv,nd->vd", d_logits, hidden[i], preferred_element_type=jnp.float32),
        )

    if logits is not None:
        d_hidden, d_projection = gradients(0, logits)
        d_hidden = d_hidden[None]
    else:

        def body(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
            d_hidden, d_projection = gradients(i, None)
            return total[0].at[i].set(d_hidden), total[1] + d_projection

        nothing = jnp.zeros_like(hidden), jnp.zeros(projection.shape, jnp.float32)
        d_hidden, d_projection = jax.lax.fori_loop(0, num_needed, body, nothing)
    return d_projection.astype(projection.dtype), None, d_hidden, None


_of_chunks.defvjp(_forward, _backward)


class Statistics(NamedTuple):
    """What a row of logits comes to."""

    logprob: Float[Array, "N"]  # of the token
    entropy: Float[Array, "N"]
    log_normalizer: Float[Array, "N"]  # log Σ exp(logits)


_LEAST = -1e9
"""Stands for the log-probability of a forbidden id, -inf: 0 log 0 is 0, not NaN."""


def _statistics(logits: Float[Array, "N V"], token: Int[Array, "N"]) -> Statistics:
    """With m the greatest logit and w = exp(z - m): log p_c = z_c - m - log Σ w, and
    H = log Σ w - Σ w (z - m) / Σ w."""
    greatest = logits.max(axis=-1)
    shifted = logits - greatest[:, None]
    weights = jnp.exp(shifted)
    total = weights.sum(axis=-1)
    mean = (weights * jnp.maximum(shifted, _LEAST)).sum(axis=-1) / total
    chosen = jnp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0]
    log_total = jnp.log(total)
    return Statistics(chosen - log_total, log_total - mean, greatest + log_total)


def _logits_gradient(
    logits: Float[Array, "N V"],
    token: Int[Array, "N"],
    statistics: Statistics,
    d_logprob: Float[Array, "N"],
    d_entropy: Float[Array, "N"],
) -> Float[Array, "N V"]:
    """From ∂ log p_c / ∂z_j = 1[j = c] - p_j and ∂H / ∂z_j = -p_j (log p_j + H)."""
    _, entropy, log_normalizer = (x[:, None] for x in statistics)
    d_logprob, d_entropy = d_logprob[:, None], d_entropy[:, None]
    log_p = jnp.maximum(logits - log_normalizer, _LEAST)
    is_token = jnp.arange(logits.shape[-1]) == token[:, None]
    through_p = jnp.exp(log_p) * (d_logprob + d_entropy * (log_p + entropy))
    return jnp.where(is_token, d_logprob, 0.0) - through_p


def _logits(
    hidden: Float[Array, "N D"],
    projection: Float[Array, "V D"],
    chosen: ChosenTokens,
    rules: mdp.Rules,
    temperature: float,
) -> Float[Array, "N V"]:
    """Of the sampling distribution: tempered, those of forbidden ids at -inf."""
    allowed = mdp.action_mask(chosen.step, rules, jnp)
    if chosen.sampling_mask is not None:
        allowed &= unpack_bits(chosen.sampling_mask, rules.vocab_size)
    return sampling_logits(project(hidden, projection), allowed, temperature)


def _at(i: Array | int, tree: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)
