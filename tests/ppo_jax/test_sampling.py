"""Top-k and top-p against the warpers of `transformers`, and the sampling masks they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ppo_jax.sampling import (
    Sampling,
    _greatest_by_formula,
    _greatest_in_one_pass,
    argmax,
    greatest,
    pack_bits,
    sampling_logits,
    truncation,
    unpack_bits,
)

ROWS, VOCAB = 6, 37
compiled_truncation = jax.jit(truncation, static_argnums=1)
quick = settings(deadline=None, max_examples=40, derandomize=True)
SAMPLINGS = [
    Sampling(top_k=5),
    Sampling(top_p=0.8),
    Sampling(top_k=12, top_p=0.6),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
    Sampling(top_k=1000, top_p=0.999),
]


def random_logits(seed, spread=3.0, forbidden=8):
    """Of different ids all different, some of them forbidden."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(ROWS, VOCAB)).astype(np.float32)
    for row in logits:
        row[rng.choice(VOCAB, forbidden, replace=False)] = -np.inf
    return logits


def kept_by_transformers(logits, sampling):
    scores = torch.tensor(logits)
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p is not None:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return np.isfinite(scores.numpy())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_keeps_what_transformers_keeps(sampling):
    sizes = set()
    for seed in range(20):
        for spread in (0.3, 3.0):
            logits = random_logits(seed, spread)
            kept = np.asarray(compiled_truncation(logits, sampling))
            np.testing.assert_array_equal(kept, kept_by_transformers(logits, sampling))
            sizes |= set(kept.sum(axis=1).tolist())
    if sampling.top_p not in (None, 1e-6):
        assert len(sizes) > 3, "the rows must differ for this to test anything"


@quick
@given(st.integers(0, 100_000), st.sampled_from(SAMPLINGS))
def test_what_is_kept_is_the_most_probable_ids_and_as_few_as_reach_p(seed, sampling):
    logits = random_logits(seed)
    k, p = sampling.top_k or VOCAB, sampling.top_p or 1.0
    kept = np.asarray(compiled_truncation(logits, sampling))
    for row, is_kept in zip(logits.astype(np.float64), kept, strict=True):
        assert 1 <= is_kept.sum() <= k
        assert row[is_kept].min() > row[~is_kept].max(initial=-np.inf)
        top = np.sort(np.exp(row - row.max()))[::-1][:k]
        cumulative = np.cumsum(top / top.sum())
        few = is_kept.sum()
        assert cumulative[few - 1] >= p - 1e-5
        assert few == 1 or cumulative[few - 2] < p + 1e-5


def test_ids_as_probable_as_the_last_one_are_kept_with_it():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    for sampling, expected in (
        (Sampling(top_k=2), 3),
        (Sampling(top_p=0.5), 3),
        (Sampling(top_k=4), 5),
        (Sampling(top_k=1, top_p=0.9), 1),
    ):
        np.testing.assert_array_equal(truncation(logits, sampling)[0], np.arange(5) < expected)


@quick
@given(
    st.lists(st.integers(-6, 6), min_size=VOCAB, max_size=VOCAB),
    st.sampled_from(SAMPLINGS),
    st.integers(0, 2**VOCAB - 2),
)
def test_a_sort_keeps_the_same_of_many_that_are_as_probable(levels, sampling, forbidden):
    """Of logits of 13 levels, each probability apart from all others by far more than rounding."""
    logits = np.array([levels], np.float32) / 4
    logits[0, [bool(forbidden >> i & 1) for i in range(VOCAB)]] = -np.inf
    wide = logits[0].astype(np.float64)
    order = np.sort(wide)[::-1][: sampling.top_k or VOCAB]
    p = np.exp(order - order[0])
    before = np.cumsum(p / p.sum()) - p / p.sum()
    mass = sampling.top_p or 1.0
    assume(mass == 1.0 or abs(before[1:] - mass).min(initial=1) > 1e-5)
    least = order[(before < mass) & (order > -np.inf)].min()
    kept = compiled_truncation(logits, sampling)[0]
    np.testing.assert_array_equal(kept, wide >= least)


def test_what_is_forbidden_is_never_kept():
    logits = np.full((1, 5), -np.inf, np.float32)
    logits[0, 3] = 0.0
    for sampling in SAMPLINGS:
        kept = truncation(jnp.asarray(logits), sampling)[0]
        np.testing.assert_array_equal(kept, np.arange(5) == 3)


def test_top_p_of_one_keeps_everything_in_a_large_vocabulary():
    """Where the rounding of a long cumulative sum must not cut the tail off."""
    logits = np.random.default_rng(0).normal(0, 1, (4, 50_000)).astype(np.float32)
    assert compiled_truncation(logits, Sampling(top_p=1.0)).all()
    assert compiled_truncation(logits, Sampling(top_k=20_000, top_p=1.0)).sum() == 4 * 20_000


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=50), Sampling(top_p=0.9), Sampling(1.0, 50, 0.9)]
)
def test_a_large_vocabulary_is_not_sorted(sampling):
    """As XLA would for the last of the top k; sorting is most of a decode step's time."""
    program = compiled_truncation.lower(np.zeros((2, 30_000), np.float32), sampling).compile()
    assert "sort(" not in program.as_text()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_top_p_of_a_large_vocabulary(top_p):
    """Down to probabilities that float32 does not tell from 0."""
    spread = np.array([[0.1], [1.0], [8.0], [40.0]])
    logits = (spread * np.random.default_rng(0).normal(size=(4, 5000))).astype(np.float32)
    all_kept = np.asarray(compiled_truncation(logits, Sampling(top_p=top_p)))
    for row, kept in zip(logits.astype(np.float64), all_kept, strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        assert row[kept].min() > row[~kept].max()
        assert p[kept].sum() >= top_p - 1e-5
        assert p[kept].sum() - p[kept].min() < top_p + 1e-5


def test_greedy_is_the_limit_of_every_truncation():
    logits = random_logits(0)
    most_probable = np.arange(VOCAB) == logits.argmax(axis=1, keepdims=True)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(top_k=1, top_p=0.1)):
        np.testing.assert_array_equal(truncation(logits, sampling), most_probable)


def test_temperature_divides_and_what_is_not_allowed_is_gone():
    logits = random_logits(1, forbidden=0)
    allowed = np.random.default_rng(2).random(logits.shape) < 0.5
    tempered = np.asarray(sampling_logits(logits, allowed, 0.5))
    np.testing.assert_array_equal(tempered, np.where(allowed, logits * 2, -np.inf))
    assert tempered.dtype == np.float32


def test_argmax_is_that_of_numpy():
    rng = np.random.default_rng(0)
    rows = rng.integers(-3, 4, (200, 7)).astype(np.float32)  # most rows have several greatest
    rows[rng.random(rows.shape) < 0.3] = -np.inf
    rows[:2] = np.array([[-np.inf], [np.inf]])
    np.testing.assert_array_equal(jax.jit(argmax)(rows), rows.argmax(1))
    rows[:, 3] = np.nan
    assert np.isin(jax.jit(argmax)(rows), np.arange(7)).all()


@pytest.mark.parametrize("way", [_greatest_by_formula, _greatest_in_one_pass])
def test_the_greatest_and_its_log_probability(way):
    """Of rows with forbidden ids, of far apart logits, and with several greatest."""
    logits = np.concatenate([random_logits(i, spread) for i, spread in enumerate((0.1, 3, 60))])
    drawn = np.random.default_rng(5).gumbel(size=logits.shape).astype(np.float32)
    for noise in (drawn, np.zeros_like(drawn)):
        logits[-1, 3:9] = logits[-1].max() + 7  # with no noise, the first of these
        token, logprob = jax.jit(way)(logits, noise)
        np.testing.assert_array_equal(token, (logits + noise).argmax(1))
        log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
        expected = np.take_along_axis(log_p, np.asarray(token)[:, None], axis=1)[:, 0]
        largest = np.float32(abs(logits[np.isfinite(logits)]).max())
        np.testing.assert_allclose(logprob, expected, rtol=1e-6, atol=np.spacing(largest))


def test_an_accelerator_goes_over_the_logits_once():
    """In one reduction of five numbers; a CPU in several of one."""

    def reductions(platform):
        arguments = jnp.zeros((2, 50)), jnp.zeros((2, 50))
        lowered = jax.jit(greatest).trace(*arguments).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("stablehlo.reduce(")

    assert [reductions(platform) for platform in ("cuda", "tpu")] == [1, 1]
    assert reductions("cpu") > 2


@pytest.mark.parametrize("size", [1, 7, 8, 9, 37])
def test_a_packed_mask_unpacks_to_itself(size):
    sampling_mask = np.random.default_rng(size).random((3, 5, size)) < 0.5
    bits = pack_bits(sampling_mask)
    assert bits.dtype == np.uint8
    assert bits.shape == (3, 5, -(-size // 8))
    np.testing.assert_array_equal(unpack_bits(bits, size), sampling_mask)


def test_it_is_truncated_only_where_ids_are_left_out():
    assert not Sampling(0.7).is_truncated
    assert not Sampling(top_p=1.0).is_truncated
    assert Sampling(top_k=3).is_truncated
    assert Sampling(top_p=0.9).is_truncated
