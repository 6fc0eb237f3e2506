"""Checksums of arrays that lie on many devices: the same however they are cut.

The checksum of an array is Σ w[i] (2 i + 1) mod 2^64, where w[i] are the bits of its number i in
row-major order. Each process adds up what its own devices keep. The factors are odd, so that no
change of a single number leaves the sum as it was.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ppo_jax.hosts import together

_AT_ONCE = 2**15  # numbers that are widened together


def checksums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Of each array; on every process, of the whole arrays."""
    own = {name: _of_own_pieces(array) for name, array in arrays.items()}
    parts = together(lambda: own)
    return {name: sum(part[name] for part in parts) % 2**64 for name in own}


def digest(tree: Any) -> str:
    """One of all arrays of a tree, and of their names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    of_each = checksums({jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    return hashlib.blake2b(repr(sorted(of_each.items())).encode(), digest_size=16).hexdigest()


def _of_own_pieces(array: jax.Array | np.ndarray) -> int:
    if isinstance(array, np.ndarray):
        return _of_piece(array, (slice(None),) * array.ndim, array.shape)
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return sum(_of_piece(np.asarray(x.data), x.index, array.shape) for x in shards) % 2**64


def _of_piece(piece: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """Of a piece of an array of `shape`, which is `array[index]`."""
    first = [part.start or 0 for part in index] or [0]
    shape, sizes = shape or (1,), piece.shape or (1,)
    row = np.zeros(1, np.uint64)  # the place of the first number of each row in the whole array
    for start, size, width in zip(first[:-1], sizes[:-1], shape[1:], strict=True):
        places = np.arange(start, start + size, dtype=np.uint64)
        row = ((row[:, None] + places) * np.uint64(width)).reshape(-1)
    factor = 2 * np.arange(first[-1], first[-1] + sizes[-1], dtype=np.uint64) + 1
    bits = np.ascontiguousarray(piece).reshape(-1, sizes[-1]).view(f"u{piece.dtype.itemsize}")
    total, at_once = 0, max(_AT_ONCE // sizes[-1], 1)
    for start in range(0, len(bits), at_once):
        wide = bits[start : start + at_once].astype(np.uint64)  # products and sums wrap at 2^64
        of_rows = wide @ factor + wide.sum(axis=1) * 2 * row[start : start + at_once]
        total += int(of_rows.sum())
    return total % 2**64
