"""Where sequences are put, and how many rows are computed for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax import packing

WIDTH = 12
places = jax.jit(packing.places, static_argnums=1)


@st.composite
def lengths(draw):
    """Eight of them, so that one program serves every example."""
    return np.array(draw(st.lists(st.integers(1, WIDTH), min_size=8, max_size=8)), np.int32)


@settings(deadline=None)  # the first example compiles
@given(lengths())
def test_sequences_lie_inside_their_rows_and_apart(length):
    row, start, num_rows = places(length, WIDTH)
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
    row, start, num_rows = places(length, WIDTH)
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
    sizes = (3, 5, 8, 10)

    def taken(needed: jax.Array) -> jax.Array:
        return packing.at_size(lambda size, x: x + size, needed, sizes, jnp.zeros((), jnp.int32))

    taken = jax.jit(taken) if jitted else taken
    for needed in range(11):
        assert taken(jnp.asarray(needed)) == next(size for size in sizes if size >= needed)
