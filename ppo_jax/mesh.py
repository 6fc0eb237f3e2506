"""The mesh: rows of a batch are cut over all devices, parameters over some of them.

A mesh has two axes, (copies, shards). The rows of a batch are cut over both. The matrices of a
backbone are cut over the shards, and each of the copies has all of them; what is not a matrix is
small, and whole on every device. Moments and the reference lie as the parameters do. A pass puts
a layer together where it computes it, and forgets it again; the transpose of that adds the layer's
gradients up and leaves each device its own shard of them.

A device computes its rows as if there were no others: loops end there when its own rows have ended,
short sequences share its own rows. Only sums cross between devices. What depends on the whole
batch, such as whitening, the weights of the loss and the number of a row, which its random numbers
come from, is computed before the rows are cut. So tokens are the same on any number of devices, and
updates are but for rounding.

A mesh of None is one device: everything here then changes nothing.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, DTypeLike, Float

from qwen_env.errors import UsageError

COPIES, SHARDS = "copies", "shards"
ROWS = (COPIES, SHARDS)
"""The axes of a mesh, both of which cut rows."""

Tree = TypeVar("Tree")


def make_mesh(num_devices: int, num_shards: int = 1) -> Mesh | None:
    """A mesh over the first `num_devices` devices, those of all processes; None for one.

    Args:
        num_shards: devices that one copy of the parameters is cut over; it divides `num_devices`.

    Raises:
        UsageError: there are not so many, or some processes would have none.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise UsageError(
            f"num_devices is {num_devices}, but JAX finds {len(devices)} here "
            f"({devices[0].platform}); lower it, or, to try it out on a CPU, set "
            f"JAX_NUM_CPU_DEVICES={num_devices} in the environment."
        )
    if jax.process_count() > 1 and num_devices < len(devices):
        raise UsageError(
            f"num_devices is {num_devices}, but the {jax.process_count()} processes have "
            f"{len(devices)} devices, and each takes part with all of its own; set num_devices to "
            f"{len(devices)}."
        )
    if num_devices == 1:
        return None
    shape = num_devices // num_shards, num_shards
    return jax.make_mesh(shape, ROWS, (AxisType.Auto,) * 2, devices=devices[:num_devices])


_PROJECTION = re.compile(r"_proj\.weight(\.value)?$")
_TABLE = re.compile(r"(embed_tokens|lm_head)(\.value)?$")
_IN_STACK = re.compile(r"(^|\.)(lower_)?layers\.")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _cut_axis(path: tuple[Any, ...]) -> int | None:
    """The axis along which an array of a state, or of a part of one, is cut, from its end.

    Projections [out, in] are cut along `out`, so that what is gathered lies in one piece; tables
    [V, D] along D, since V may be any number. Nothing else is cut.
    """
    name = _name(path)
    return -2 if _PROJECTION.search(name) else -1 if _TABLE.search(name) else None


def _spec(path: tuple[Any, ...], x: Any, num_shards: int) -> P:
    axis = _cut_axis(path)
    if num_shards == 1 or axis is None or np.ndim(x) < 2:
        return P()
    if x.shape[axis] % num_shards:
        raise UsageError(
            f"num_shards is {num_shards}, which does not divide the {x.shape[axis]} "
            f"{'rows' if axis == -2 else 'columns'} of {_name(path).removesuffix('.value')}; "
            "choose a number that does."
        )
    return P(*[None] * (x.ndim + axis), SHARDS)


def _specs(tree: Tree, mesh: Mesh) -> Tree:
    num_shards = mesh.shape[SHARDS]
    specs: Tree = jax.tree_util.tree_map_with_path(lambda path, x: _spec(path, x, num_shards), tree)
    return specs


def shardings(tree: Any, mesh: Mesh | None) -> Any:
    """Where each array of a state, or of a part of one, lies; None leaves it to JAX.

    Args:
        tree: of arrays, or of their shapes.

    Raises:
        UsageError: an array cannot be cut into so many shards.
    """
    if mesh is None:
        return None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(tree, mesh))


def place(tree: Tree, mesh: Mesh | None) -> Tree:
    """The arrays where `shardings` says; outside of compiled functions.

    Those that a process has made itself, such as adapters, all have made alike.
    """
    return tree if mesh is None else jax.tree.map(_placed, tree, shardings(tree, mesh))


def _placed(x: Any, sharding: NamedSharding) -> jax.Array:
    if x.is_fully_addressable and not sharding.is_fully_addressable:
        array = np.asarray(x)  # what `device_put` makes of `x` cannot tell its shards (jax 0.10.2)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: array[index])
    placed: jax.Array = jax.device_put(x, sharding)
    return placed


def from_host(path: tuple[Any, ...], array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array of the host, under its path in a state, which no device gets more of than it keeps.

    Every process has all of it, and reads what its own devices keep.
    """
    if mesh is None:
        return jnp.asarray(array)
    keys = tuple(map(jax.tree_util.DictKey, path))
    sharding = NamedSharding(mesh, _spec(keys, array, mesh.shape[SHARDS]))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Where an array lies that every device has all of; None leaves it to JAX."""
    return None if mesh is None else NamedSharding(mesh, P())


def replicate(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array of the host, which every process has all of, on every device."""
    if mesh is None:
        return jnp.asarray(array)
    sharding = NamedSharding(mesh, P())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_own_rows(
    function: Callable[[Any, Any], Tree], mesh: Mesh | None, *, gives_rows: bool = True
) -> Callable[[Any, Any], Tree]:
    """`function(params, rows)`, of which every device computes its share of the rows.

    Args:
        function: of what lies as `shardings` says, and of arrays whose first axis is cut.
        gives_rows: its results are put together along their first axis; otherwise they lie as
            `shardings` says, as those of `psum` do.
    """
    if mesh is None:
        return function

    def apply(params: Any, rows: Any) -> Tree:
        results = P(ROWS)
        if not gives_rows:
            results = _specs(jax.eval_shape(function, params, rows), mesh)
        inside = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(_specs(params, mesh), P(ROWS)),
            out_specs=results,
            check_vma=False,  # with it, gradients would be summed once a layer and a micro-batch
        )
        return inside(params, rows)

    return apply


def sum_over_arrays(
    function: Callable[[Array], Float[Array, ""]], tree: Any, mesh: Mesh | None
) -> Float[Array, ""]:
    """Σ function(x) over the arrays of a tree, of which every device sees its own shards."""

    def of_array(path: tuple[Any, ...], x: Array) -> Any:
        is_cut = _are_cut() and _cut_axis(path) is not None
        return jax.lax.psum(function(x), SHARDS) if is_cut else function(x)

    def total(tree: Any) -> Any:
        return sum(of_array(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(tree))

    of_all: Callable[[Any], Any] = total
    if mesh is not None and mesh.shape[SHARDS] > 1:
        specs = (_specs(tree, mesh),)
        of_all = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    result: Array = of_all(tree)
    return result


# What follows is for use inside of `on_own_rows`; elsewhere it changes nothing.


def _is_inside() -> bool:
    return SHARDS in jax.sharding.get_abstract_mesh().manual_axes


def _are_cut() -> bool:
    """Whether matrices are the shards of a device here."""
    return _is_inside() and bool(jax.sharding.get_abstract_mesh().shape[SHARDS] > 1)


def gather(tree: Tree, dtype: DTypeLike | None = None) -> Tree:
    """Matrices put together from their shards, but those of layers in a stack.

    A layer is gathered when it has left its stack, so that few are whole at a time.

    Args:
        dtype: that they are needed in; their gradients are added up in float32 all the same.
    """
    if not _are_cut():
        return tree

    def gathered(path: tuple[Any, ...], x: Array) -> Array:
        if (axis := _cut_axis(path)) is None or _IN_STACK.search(_name(path)):
            return x
        return _gather(x, x.ndim + axis, jnp.dtype(x.dtype if dtype is None else dtype))

    whole: Tree = jax.tree_util.tree_map_with_path(gathered, tree)
    return whole


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: Float[Array, "..."], axis: int, dtype: Any) -> Float[Array, "..."]:
    whole: Array = jax.lax.all_gather(shard.astype(dtype), SHARDS, axis=axis, tiled=True)
    return whole


def _gather_forward(shard: Array, axis: int, dtype: Any) -> tuple[Array, Array]:
    return _gather(shard, axis, dtype), jnp.zeros((), shard.dtype)


def _gather_backward(axis: int, dtype: Any, like: Array, cotangent: Array) -> tuple[Array]:
    wide = cotangent.astype(jnp.float32)
    total = jax.lax.psum_scatter(wide, SHARDS, scatter_dimension=axis, tiled=True)
    return (total.astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def psum(tree: Tree) -> Tree:
    """The sum over the devices; over the shards, `gather` has added gradients up already."""
    if not _is_inside():
        return tree

    def summed(path: tuple[Any, ...], x: Array) -> Array:
        is_cut = _are_cut() and _cut_axis(path) is not None
        if is_cut and jax.sharding.get_abstract_mesh().shape[COPIES] == 1:
            return x
        total: Array = jax.lax.psum(x, COPIES if is_cut else ROWS)
        return total

    sums: Tree = jax.tree_util.tree_map_with_path(summed, tree)
    return sums


def pmax(tree: Tree) -> Tree:
    """The maximum over the devices."""
    greatest: Tree = jax.lax.pmax(tree, ROWS) if _is_inside() else tree
    return greatest


def pmax_over_shards(x: Array) -> Array:
    """The maximum over the devices that gather together: there they take the same branch."""
    return jax.lax.pmax(x, SHARDS) if _are_cut() else x
