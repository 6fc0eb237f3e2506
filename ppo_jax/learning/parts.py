"""Functions of rows, computed a part at a time: over devices, micro-batches and packed rows.

    rows  -- shard_map -->  a device's own  -- scan -->  a micro-batch  -- switch -->  packed rows

and back again: the results of the parts are put together, or added up. A loss whose tokens' weights
add up to 1 over a whole minibatch has the same sum however it is cut.

Shapes: M rows, S their width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ppo_jax.learning.packing import Layout, in_fewest_rows
from ppo_jax.mesh import on_own_rows, pmax, psum


@dataclass(frozen=True)
class Reduction:
    """How the results of parts come together."""

    over_microbatches: Callable[[Callable[[Any], Any], Any], Any]  # like `jax.lax.map`
    over_devices: Callable[[Any], Any]
    gives_rows: bool  # or results that are the same on every device


def in_parts(
    function: Callable[[Any, Any, Layout | None], Any],
    params: Any,
    rows: Any,
    length: Int[Array, "M"],
    reduction: Reduction,
    *,
    mesh: Mesh | None,
    num_microbatches: int,
    num_packed_sizes: int,
    width: int,
) -> Any:
    """`function(params, rows, layout)` of all rows.

    Args:
        function: of some of the rows, packed as its layout says (`learning.packing`).
        params: that lie as `ppo_jax.mesh` says.
        rows: arrays whose first axis is cut.
        length: of each row's tokens, 1 to `width`.
        reduction: `CONCATENATE` or `ADD`.
        num_microbatches: parts of a device's rows, one after another.
        num_packed_sizes: see `in_fewest_rows`.
    """

    def of_microbatch(params: Any, part: tuple[Any, Array]) -> Any:
        rows, length = part
        return in_fewest_rows(partial(function, params, rows), length, width, num_packed_sizes)

    def of_device(params: Any, part: tuple[Any, Array]) -> Any:
        if num_microbatches == 1:
            result = of_microbatch(params, part)
        else:
            cut = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), part)
            result = reduction.over_microbatches(partial(of_microbatch, params), cut)
        return result if mesh is None else reduction.over_devices(result)

    of_all = on_own_rows(of_device, mesh, gives_rows=reduction.gives_rows)
    return of_all(params, (rows, length))


# ---------------------------------------------------------------- results with a row for each row


def _concatenate(function: Callable[[Any], Any], cut: Any) -> Any:
    results = jax.lax.map(function, cut)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


CONCATENATE = Reduction(_concatenate, lambda result: result, gives_rows=True)
"""Results have a row for each row, and are put together in the same order."""


# ---------------------------------------------------------------- sums and maxima over all rows


class Totals(NamedTuple):
    """Results over some of the rows, and so over all of them."""

    sums: Any
    maxima: Any


def _add(function: Callable[[Any], Totals], cut: Any) -> Totals:
    def add(total: Totals, part: Any) -> tuple[Totals, None]:
        result = function(part)
        sums = jax.tree.map(jnp.add, total.sums, result.sums)
        return Totals(sums, jax.tree.map(jnp.maximum, total.maxima, result.maxima)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], cut))
    nothing: Totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, nothing._replace(sums=_widened(nothing.sums)), cut)
    return total


def _add_over_devices(result: Totals) -> Totals:
    return Totals(psum(_widened(result.sums)), pmax(result.maxima))


def _widened(tree: Any) -> Any:
    """Floats to float32: a sum in bfloat16 loses its small parts."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


ADD = Reduction(_add, _add_over_devices, gives_rows=False)
"""Results are `Totals`, whose maxima are at least 0; sums of several parts are in float32."""
