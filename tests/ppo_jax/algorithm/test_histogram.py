"""Histograms against NumPy's."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.algorithm import ADVANTAGE_EDGES, RATIO_EDGES, masked_histogram

compiled = jax.jit(masked_histogram)
quick = settings(deadline=None, max_examples=40, derandomize=True)


@quick
@given(st.integers(0, 10_000), st.sampled_from([RATIO_EDGES, ADVANTAGE_EDGES]))
def test_agrees_with_numpy_on_the_valid_entries(seed, edges):
    rng = np.random.default_rng(seed)
    x = rng.normal(edges.mean(), np.ptp(edges) / 3, (6, 7)).astype(np.float32)
    mask = rng.random(x.shape) < 0.7
    counts = compiled(x, mask, edges)
    # NumPy leaves out what lies beyond the edges; here the outer bins hold it.
    inside = np.clip(x[mask], edges[0], edges[-1])
    np.testing.assert_array_equal(counts, np.histogram(inside, edges)[0])
    assert counts.sum() == mask.sum()


def test_an_edge_belongs_to_the_bin_above_it():
    edges = np.array([0.0, 1.0, 2.0])
    x = np.array([0.0, 1.0, 2.0, -9.0, 9.0, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(compiled(x, np.ones(7, bool), edges), [3, 4])
    np.testing.assert_array_equal(compiled(x, np.zeros(7, bool), edges), [0, 0])


def test_garbage_is_not_counted():
    mask = np.array([True, False, False])
    x = np.array([0.5, np.nan, np.inf], np.float32)
    np.testing.assert_array_equal(compiled(x, mask, np.array([0.0, 1.0])), [1])


def test_the_edges_say_what_they_promise():
    for edge in (0.8, 1.0, 1.2):  # the usual clip range, and no move
        assert np.isclose(RATIO_EDGES, edge).any()
    assert np.isclose(ADVANTAGE_EDGES, 0).any()
    for edges in (RATIO_EDGES, ADVANTAGE_EDGES):
        assert len(edges) == 41
        assert np.diff(edges) == pytest.approx(np.diff(edges)[0])
