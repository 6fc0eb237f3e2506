"""The chunked teacher forcing against the plain computation over full logits."""

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.learning import logprobs
from ppo_jax.learning.packing import Layout, first_fit
from ppo_jax.learning.response_outputs import ResponseOutputs, response_outputs
from ppo_jax.models import (
    DecoderConfig,
    PolicyValueNetwork,
    with_separate_critic,
)
from ppo_jax.sampling import Sampling, pack_bits
from qwen_env import mdp

RULES = mdp.Rules(
    max_prompt_length=6,
    max_new_tokens=41,
    vocab_size=96,
    eos_token_ids=(3, 5),
    forbidden_token_ids=(0, 7, 95),
    min_new_tokens=4,
)
CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
TEMPERATURE = 0.7
PROMPT_LENGTH = np.array([6, 2, 4, 1, 6])
T, S = 41, 47
RESPONSE_LENGTH = np.array([41, 7, 1, 23, 40])
LENGTH = PROMPT_LENGTH + RESPONSE_LENGTH
IS_RESPONSE = np.arange(T) < RESPONSE_LENGTH[:, None]
CHUNK = 128
assert IS_RESPONSE.size > CHUNK  # more than one chunk
assert IS_RESPONSE.size % -(-IS_RESPONSE.size // CHUNK)  # and the last one not full


@pytest.fixture(autouse=True)
def chunks_of(monkeypatch):
    """Set the rows a chunk has at most, but for the network's D; CHUNK before any test."""

    def set_rows(rows, vocab_size=RULES.vocab_size):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", rows * vocab_size + vocab_size // 2)
        differentiated.clear_cache()  # the number is compiled in

    set_rows(CHUNK)
    return set_rows


@pytest.fixture(scope="module")
def split():
    """A network as (graphdef, state): no norm is 1, no bias and no value 0, attention not even."""
    network = PolicyValueNetwork(CONFIG, rngs=nnx.Rngs(0))
    network.value_head.weight[...] = jnp.linspace(-1, 1, 32)[None]
    graphdef, state = nnx.split(network)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: x + 0.15 * rng.normal(size=x.shape).astype("f4"), state)


@pytest.fixture(scope="module")
def tokens():
    """Rows that the MDP could have written; padding that it could not."""
    rng = np.random.default_rng(1)
    tokens = rng.choice([1, 2, 4, *range(8, 95)], (5, S))
    tokens[1, LENGTH[1] - 1] = 3  # an end of sequence, allowed that late
    padding = np.arange(S) >= LENGTH[:, None]
    tokens[padding] = rng.integers(0, 96, padding.sum())
    return tokens


@pytest.fixture(scope="module")
def sampling_mask(tokens):
    """For each step some of the allowed ids, the chosen one among them; everything behind the end.

    Of the longest responses' last step, the chosen id alone.
    """
    sampling_mask = np.random.default_rng(3).random((5, T, RULES.vocab_size)) < 0.2
    sampling_mask[0, T - 1] = False
    sampling_mask &= allowed_ids(RULES)
    index = np.minimum(PROMPT_LENGTH[:, None] + np.arange(T), S - 1)
    chosen = np.take_along_axis(tokens, index, axis=1)
    np.put_along_axis(sampling_mask, chosen[..., None], True, axis=-1)
    return sampling_mask | ~IS_RESPONSE[..., None]


def allowed_ids(rules):
    allowed = np.ones((rules.max_new_tokens, rules.vocab_size), bool)
    allowed[:, list(rules.forbidden_token_ids)] = False
    allowed[: rules.min_new_tokens, list(rules.eos_token_ids)] = False
    return allowed


def chunked(
    network, tokens, sampling_mask=None, rules=RULES, temperature=TEMPERATURE, num_rows=None
):
    return response_outputs(
        network,
        tokens,
        jnp.asarray(PROMPT_LENGTH),
        jnp.asarray(LENGTH),
        None if sampling_mask is None else pack_bits(sampling_mask),
        rules=rules,
        sampling=Sampling(temperature),
        layout=Layout(num_rows, first_fit(jnp.asarray(LENGTH), S)[0]) if num_rows else None,
    )


def plain(network, tokens, sampling_mask=None, rules=RULES, temperature=TEMPERATURE):
    """The same numbers, from the logits of every position at once."""
    logits, values = network(tokens, np.arange(S) < LENGTH[:, None])
    step = np.arange(T)
    before = np.minimum(PROMPT_LENGTH[:, None] + step, S - 1) - 1  # logits there predict the token
    rows = np.arange(5)[:, None]
    allowed = allowed_ids(rules) if sampling_mask is None else allowed_ids(rules) & sampling_mask
    log_p = jax.nn.log_softmax(jnp.where(allowed, logits[rows, before] / temperature, -1e30))
    chosen = tokens[rows, before + 1]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return ResponseOutputs(
        log_p[rows, step, chosen], entropy, values[rows, before], values[np.arange(5), LENGTH - 1]
    )


def masked_sum(outputs):
    """A loss with a weight of its own for every number that counts."""
    weights = np.random.default_rng(2).normal(size=(4, 5, T)).astype(np.float32)
    loss = sum(
        jnp.sum(jnp.where(IS_RESPONSE, x * w, 0.0))
        for x, w in zip(outputs[:3], weights[:3], strict=True)
    )
    return loss + jnp.sum(outputs.last_value * weights[3, :, 0])


@partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames="num_rows",
    # Without LLVM's optimizer, as these are many programs for one run each.
    compiler_options={"xla_backend_optimization_level": 0},
)
@partial(jax.value_and_grad, argnums=2, has_aux=True)
def differentiated(function, graphdef, state, tokens, sampling_mask=None, **options):
    """((loss, outputs), gradients)"""
    outputs = function(nnx.merge(graphdef, state), tokens, sampling_mask, **options)
    return masked_sum(outputs), outputs


def assert_equal_outputs(ours, expected):
    assert ours.value_logits is None, "of a head without bins"
    for name in ("logprobs", "entropy", "values", "last_value"):
        array = getattr(ours, name)
        assert array.dtype == jnp.float32, name
        assert array.shape == ((5,) if name == "last_value" else (5, T)), name
        where = slice(None) if name == "last_value" else IS_RESPONSE
        np.testing.assert_allclose(
            array[where],
            getattr(expected, name)[where],
            rtol=0,
            atol=1e-5,
            err_msg=name,
        )


def assert_tells(ours):
    """That the outputs are not of a distribution in which anything would look right."""
    entropy = ours.entropy[IS_RESPONSE]
    assert entropy.min() > 0.1
    assert entropy.max() < math.log(96)
    assert ours.logprobs[IS_RESPONSE].max() < 0


@pytest.mark.slow
@pytest.mark.parametrize("rows", [50, 1000])
def test_equals_the_computation_over_full_logits(split, tokens, chunks_of, rows):
    """In chunks of 50 rows, and in one. Chunks of other sizes: see test_logprobs.py."""
    chunks_of(rows)
    (_, ours), our_gradients = differentiated(chunked, *split, tokens)
    (_, expected), gradients = differentiated(plain, *split, tokens)
    assert_equal_outputs(ours, expected)
    assert_tells(ours)
    assert_equal_gradients(our_gradients, gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "chunk", "critic"), [(3, 50, "separate"), (4, 1000, "shared")]
)
def test_over_a_sampling_mask_in_packed_rows_it_is_normalised_over_that(
    split, tokens, sampling_mask, chunks_of, num_rows, chunk, critic
):
    """Lengths of 47, 9, 5, 24 and 46 fit into three rows of 47; 112 of 205 places are responses.

    So chunks are skipped, and rows fill up the last one, whose gradients must be nothing, not NaN.
    """
    chunks_of(chunk)
    if critic == "separate":
        network = with_separate_critic(nnx.merge(*split))
        embeddings = network.critic.embed_tokens
        embeddings[...] = 0.7 * embeddings[...]  # no longer a copy of the policy's
        split = nnx.split(network)
    (_, ours), our_gradients = differentiated(
        chunked, *split, tokens, sampling_mask, num_rows=num_rows
    )
    (_, expected), gradients = differentiated(plain, *split, tokens, sampling_mask)
    assert_equal_outputs(ours, expected)
    assert_equal_gradients(our_gradients, gradients)
    assert ours.logprobs[0, T - 1] == ours.entropy[0, T - 1] == 0  # one id, and it was chosen
    assert (ours.entropy[IS_RESPONSE] <= np.log(sampling_mask.sum(-1)[IS_RESPONSE]) + 1e-5).all()


def assert_equal_gradients(our_gradients, gradients):
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(our_gradients), nnx.to_flat_state(gradients), strict=True
    ):
        a, b = np.asarray(a.get_value()), np.asarray(b.get_value())
        assert np.abs(b).max() > 0, path
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=str(path))


def test_equals_it_without_forbidden_ids_or_temperature(split, tokens):
    graphdef, state = split
    rules = mdp.Rules(6, T, vocab_size=96, eos_token_ids=(3,))

    @jax.jit
    def both(state):
        network = nnx.merge(graphdef, state)
        return [function(network, tokens, None, rules, 1.0) for function in (chunked, plain)]

    ours, expected = both(state)
    assert_equal_outputs(ours, expected)
    assert_tells(ours)


def test_what_lies_beyond_the_length_is_never_read(split, tokens, chunks_of):
    """Forbidden ids there have log-probability -inf, and still no NaN reaches a gradient."""
    chunks_of(1000)  # in one chunk, so that no padding is left out
    padding = np.arange(S) >= LENGTH[:, None]
    forbidden = np.where(padding, 0, tokens)
    (loss, outputs), gradients = differentiated(chunked, *split, forbidden)
    assert np.isneginf(outputs.logprobs[~IS_RESPONSE]).all()
    assert np.isfinite(outputs.logprobs[IS_RESPONSE]).all()
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.isfinite(leaf.get_value()).all(), path
    (same_loss, _), same_gradients = differentiated(chunked, *split, tokens)
    assert loss == same_loss
    jax.tree.map(np.testing.assert_array_equal, gradients, same_gradients)


class TestMemory:
    """B*T = 256 response positions, V large beside everything else."""

    B, P, T, V = 4, 4, 64, 4001
    RULES = mdp.Rules(P, T, vocab_size=V, eos_token_ids=(1,), forbidden_token_ids=(2,))

    def sizes(self, loss):
        """Of all arrays that the compiled value and gradient of `loss` may make."""
        config = DecoderConfig(
            vocab_size=self.V,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        network = nnx.eval_shape(lambda: PolicyValueNetwork(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(network)
        tokens = jax.ShapeDtypeStruct((self.B, self.P + self.T), jnp.int32)
        lengths = jax.ShapeDtypeStruct((self.B,), jnp.int32)
        jaxpr = jax.make_jaxpr(
            jax.value_and_grad(lambda state, *rest: loss(nnx.merge(graphdef, state), *rest))
        )(state, tokens, lengths)
        return list(array_sizes(jaxpr.jaxpr))

    def test_full_logits_are_never_made(self, chunks_of):
        chunks_of(CHUNK, self.V)
        assert self.B * self.T > CHUNK

        def loss(network, tokens, prompt_length):
            out = response_outputs(
                network,
                tokens,
                prompt_length,
                prompt_length + self.T,
                rules=self.RULES,
                sampling=Sampling(),
                remat=True,
            )
            return jnp.mean(out.logprobs) + jnp.mean(out.entropy) + jnp.mean(out.values)

        sizes = self.sizes(loss)
        assert max(sizes) < self.B * self.T * self.V
        assert max(sizes) == CHUNK * self.V  # a chunk's logits are the largest array

    def test_the_walk_finds_them_where_they_are(self):
        def loss(network, tokens, prompt_length):
            mask = jnp.arange(self.P + self.T) < prompt_length[:, None]
            logits = jax.lax.map(lambda x: x, network(tokens, mask)[0])
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        assert max(self.sizes(loss)) >= self.B * self.T * self.V


def array_sizes(jaxpr) -> Iterator[int]:
    """Element counts of every variable of a jaxpr, those of its sub-jaxprs included."""
    for variable in (*jaxpr.invars, *jaxpr.constvars):
        yield math.prod(variable.aval.shape)
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield math.prod(variable.aval.shape)
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from array_sizes(inner)
