"""Data parallelism: the rows of a batch cut over devices, each with a copy of the parameters.

A device computes its rows as if there were no others: loops end there when its own rows have ended,
short sequences share its own rows. Only sums cross between devices. What depends on the whole
batch, such as whitening, the weights of the loss and the number of a row, which its random numbers
come from, is computed before the rows are cut. So tokens are the same on any number of devices, and
updates are but for rounding.

A mesh of None is one device: everything here then changes nothing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_env.errors import UsageError

ROWS = "rows"
"""The only axis of a mesh."""

Tree = TypeVar("Tree")


def make_mesh(num_devices: int) -> Mesh | None:
    """A mesh over the first `num_devices` devices of this process; None for one.

    Raises:
        UsageError: there are not so many.
    """
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise UsageError(
            f"num_devices is {num_devices}, but JAX finds {len(devices)} here "
            f"({devices[0].platform}); lower it, or, to try it out on a CPU, set "
            f"JAX_NUM_CPU_DEVICES={num_devices} in the environment."
        )
    if num_devices == 1:
        return None
    return jax.make_mesh((num_devices,), (ROWS,), (AxisType.Auto,), devices=devices[:num_devices])


def replicate(tree: Tree, mesh: Mesh | None) -> Tree:
    """With a copy of every array on every device; outside of compiled functions."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def on_own_rows(
    function: Callable[[Any, Any], Tree], mesh: Mesh | None, *, gives_rows: bool = True
) -> Callable[[Any, Any], Tree]:
    """`function(whole, rows)`, of which every device computes its share of the rows.

    Args:
        function: of what every device has a copy of, and of arrays whose first axis is cut.
        gives_rows: its results are put together along their first axis; otherwise they are the
            same on every device, as those of `psum` are.
    """
    if mesh is None:
        return function
    whole, rows = PartitionSpec(), PartitionSpec(ROWS)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(whole, rows),
        out_specs=rows if gives_rows else whole,
        check_vma=False,  # with it, gradients would be summed once a layer and a micro-batch
    )


# These are for use inside of `on_own_rows`.


def psum(tree: Tree, mesh: Mesh | None) -> Tree:
    """The sum over the devices."""
    return tree if mesh is None else jax.lax.psum(tree, ROWS)


def pmax(tree: Tree, mesh: Mesh | None) -> Tree:
    """The maximum over the devices."""
    return tree if mesh is None else jax.lax.pmax(tree, ROWS)
