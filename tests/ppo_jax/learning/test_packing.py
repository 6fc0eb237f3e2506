"""Where sequences are put, and how many rows are computed for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.learning import packing

WIDTH = 12
first_fit = jax.jit(packing.first_fit, static_argnums=1)


@st.composite
def lengths(draw):
    """Eight of them, so that one program serves every example."""
    return np.array(draw(st.lists(st.integers(1, WIDTH), min_size=8, max_size=8)), np.int32)


@settings(deadline=None)  # the first example compiles
@given(lengths())
def test_sequences_lie_inside_their_rows_and_apart(length):
    (row, start), num_rows = first_fit(length, WIDTH)
    taken = np.zeros((8, WIDTH), int)
    for r, s, n in zip(row, start, length, strict=True):
        assert s + n <= WIDTH
        taken[r, s : s + n] += 1
    assert taken.max() == 1
    assert (taken[:num_rows].sum(axis=1) > 0).all()
    assert (taken[num_rows:] == 0).all()


@settings(deadline=None)  # the first example compiles
@given(lengths())
def test_they_are_those_of_first_fit_longest_first(length):
    """As a plain loop writes them down."""
    rows: list[list[int]] = []
    for n in sorted(length.tolist(), reverse=True):
        fitting = [row for row in rows if sum(row) + n <= WIDTH]
        fitting[0].append(n) if fitting else rows.append([n])
    (row, start), num_rows = first_fit(length, WIDTH)
    assert num_rows == len(rows)
    for number, expected in enumerate(rows):
        mine = np.flatnonzero(np.asarray(row) == number)
        mine = mine[np.argsort(np.asarray(start)[mine])]
        assert length[mine].tolist() == expected


@pytest.mark.parametrize(
    ("count", "num_sizes", "expected"),
    [(28, 1, (28,)), (28, 4, (7, 14, 21, 28)), (10, 4, (3, 5, 8, 10)), (2, 4, (1, 2))],
)
def test_sizes(count: int, num_sizes: int, expected: tuple[int, ...]) -> None:
    assert packing.sizes(count, num_sizes) == expected


@pytest.mark.parametrize("jitted", [False, True])
def test_the_smallest_size_that_will_do(jitted: bool) -> None:
    """Sizes 3, 5, 8 and 10 of ten rows: n sequences that fill a row, the others in one row."""

    def in_fewest_rows(length: jax.Array, offset: jax.Array) -> jax.Array:
        def taken(layout: packing.Layout | None) -> jax.Array:
            if layout is None:
                return offset + 10
            fits = layout.places.row.max() < layout.num_rows
            return offset + jnp.where(fits, layout.num_rows, 0)

        return packing.in_fewest_rows(taken, length, WIDTH, 4)

    in_fewest_rows = jax.jit(in_fewest_rows) if jitted else in_fewest_rows
    for full in range(11):
        length = jnp.array([WIDTH] * full + [1] * (10 - full))
        needed = min(full + 1, 10)
        expected = next(size for size in (3, 5, 8, 10) if size >= needed)
        assert in_fewest_rows(length, jnp.asarray(100)) == 100 + expected


def test_one_size_leaves_each_sequence_its_row() -> None:
    length = jnp.ones(4, jnp.int32)
    assert packing.in_fewest_rows(lambda layout: (layout, 7), length, WIDTH, 1) == (None, 7)
