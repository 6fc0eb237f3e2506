import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import PartitionSpec as P

from ppo_jax.mesh import SHARDS, make_mesh
from ppo_jax.runs.checksums import checksums, digest


def by_loop(array: np.ndarray) -> int:
    """The formula, in Python's integers."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    words: list[int] = bits.tolist()
    return sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3)), st.data())
def test_is_its_formula_and_tells_of_every_change(array: np.ndarray, data: st.DataObject) -> None:
    assert checksums({"x": array}) == {"x": by_loop(array)}
    place = data.draw(st.integers(0, array.size - 1))
    bit = data.draw(st.integers(0, 31))
    other = array.copy()
    other.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert checksums({"x": other}) != checksums({"x": array})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint32"])
@pytest.mark.parametrize("spec", [P(), P(SHARDS), P(None, SHARDS), P(None, None, SHARDS)], ids=str)
def test_is_the_same_however_an_array_is_cut(dtype: str, spec: P) -> None:
    mesh = make_mesh(8, 4)
    assert mesh is not None
    array = jnp.arange(4 * 8 * 12).reshape(4, 8, 12).astype(dtype) / 7
    cut = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
    assert checksums({"x": cut})["x"] == checksums({"x": array})["x"] == by_loop(np.asarray(array))
    assert digest({"x": cut}) == digest({"x": array}) != digest({"y": array})
