"""Log-probabilities, entropies and their gradients against JAX's own derivative of the formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.learning import logprobs
from ppo_jax.learning.logprobs import ChosenTokens, logprobs_and_entropy
from ppo_jax.sampling import pack_bits
from qwen_env import mdp

N, D, V = 90, 16, 61
TEMPERATURE = 0.7
RULES = mdp.Rules(
    max_prompt_length=4,
    max_new_tokens=N,
    vocab_size=V,
    eos_token_ids=(3, 5),
    forbidden_token_ids=(0, 7, 60),
    min_new_tokens=40,
)
STEP = np.arange(N)
IS_RESPONSE = np.random.default_rng(1).random(N) < 0.6


def inputs(*, truncated):
    """Hidden states, a projection, the ids allowed at each step, and tokens among them."""
    rng = np.random.default_rng(2)
    hidden, projection = (jnp.asarray(rng.normal(size=(n, D)), jnp.float32) for n in (N, V))
    allowed = np.array(mdp.action_mask(STEP, RULES, np))
    sampling_mask = None
    if truncated:
        sampling_mask = (rng.random((N, V)) < 0.3) & allowed
        sampling_mask[:, 10] = True
        allowed &= sampling_mask
        sampling_mask = pack_bits(jnp.asarray(sampling_mask))
    token = np.array([rng.choice(np.flatnonzero(row)) for row in allowed])
    return (
        hidden,
        projection,
        allowed,
        ChosenTokens(jnp.asarray(token), jnp.asarray(STEP), sampling_mask),
    )


def plain(hidden, projection, drawn, allowed):
    logits = jnp.where(allowed, hidden @ projection.T / TEMPERATURE, -1e30)
    log_p = jax.nn.log_softmax(logits)
    return log_p[STEP, drawn.token], -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def ours(hidden, projection, drawn):
    return logprobs_and_entropy(
        hidden, projection, drawn, IS_RESPONSE, rules=RULES, temperature=TEMPERATURE
    )


def loss(function, *operands):
    """Every number of a response has a weight of its own."""
    weights = np.random.default_rng(3).normal(size=(2, N)).astype(np.float32) * IS_RESPONSE
    outputs = function(*operands)
    terms = zip(weights, outputs, strict=True)
    return sum(jnp.vdot(w, jnp.where(IS_RESPONSE, x, 0.0)) for w, x in terms), outputs


@pytest.fixture
def chunks_of(monkeypatch):
    """Set the rows that a chunk has at most, but for D."""
    return lambda rows: monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", rows * V)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("rows", [1, 25, N])
def test_values_and_gradients(chunks_of, rows, truncated):
    """In chunks of at most D and 25 positions, the last one not full, and in one."""
    chunks_of(rows)
    hidden, projection, allowed, drawn = inputs(truncated=truncated)
    differentiated = partial(jax.value_and_grad, argnums=(1, 2), has_aux=True)
    (_, values), gradients = jax.jit(differentiated(loss), static_argnums=0)(
        ours, hidden, projection, drawn
    )
    (_, expected), expected_gradients = differentiated(loss)(
        plain, hidden, projection, drawn, allowed
    )
    for x, y in zip(values, expected, strict=True):
        np.testing.assert_allclose(x[IS_RESPONSE], y[IS_RESPONSE], rtol=0, atol=1e-5)
    for x, y in zip(gradients, expected_gradients, strict=True):
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_chunks_without_a_response_are_left_out(chunks_of):
    chunks_of(D)
    hidden, projection, _, drawn = inputs(truncated=False)
    _, entropy = ours(hidden, projection, drawn)
    needed = -(-IS_RESPONSE.sum() // 15)  # 90 positions in 6 chunks of 15
    assert (entropy[IS_RESPONSE] > 0).all()
    assert (entropy > 0).sum() == 15 * needed < N


@pytest.mark.parametrize("rows", [D, N])
def test_a_forbidden_token_beyond_a_response_does_no_harm(chunks_of, rows):
    chunks_of(rows)
    hidden, projection, _, drawn = inputs(truncated=False)
    forbidden = drawn._replace(token=jnp.where(IS_RESPONSE, drawn.token, 0))
    gradients = jax.grad(loss, argnums=(1, 2), has_aux=True)
    expected, _ = gradients(ours, hidden, projection, drawn)
    found, (logprob, _) = gradients(ours, hidden, projection, forbidden)
    assert np.isneginf(logprob).any()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_id_alone_is_certain():
    hidden, projection, _, drawn = inputs(truncated=False)
    alone = np.arange(V) == drawn.token[:, None]
    drawn = drawn._replace(sampling_mask=pack_bits(jnp.asarray(alone)))
    (_, (logprob, entropy)), gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)(
        ours, hidden, projection, drawn
    )
    assert (logprob == 0).all()
    assert (entropy == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("rows", [D, N])
def test_in_bfloat16_logits_are_float32_and_gradients_close(chunks_of, rows):
    chunks_of(rows)
    hidden, projection, allowed, drawn = inputs(truncated=False)
    narrow = hidden.astype(jnp.bfloat16), projection.astype(jnp.bfloat16)
    wide = [x.astype(np.float32) for x in narrow]
    gradients = jax.grad(loss, argnums=(1, 2), has_aux=True)
    found, values = gradients(ours, narrow[0], wide[1], drawn)
    expected, expected_values = gradients(plain, *wide, drawn, allowed)
    for x, y in zip(values, expected_values, strict=True):
        np.testing.assert_allclose(x[IS_RESPONSE], y[IS_RESPONSE], rtol=0, atol=1e-5)
    assert found[0].dtype == jnp.bfloat16
    assert found[1].dtype == jnp.float32
    for x, y in zip(found, expected, strict=True):  # a rounding of each factor, of 2^-9
        np.testing.assert_allclose(x.astype(np.float32), y, rtol=0, atol=2**-8 * np.abs(y).max())
