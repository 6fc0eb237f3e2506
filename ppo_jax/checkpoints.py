"""Checkpoints from which a run continues exactly: one Orbax folder each, all or nothing.

Arrays are stored under the names of their places in the state, so that what does not fit can be
named. Small facts that are no arrays (the best score so far) travel beside them as JSON.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ppo_jax.learner import TrainState
from qwen_env.errors import UsageError

Facts = dict[str, Any]


class Checkpoints:
    """The `checkpoints/` of a run folder.

    Args:
        folder: made if it is not there.
        keep: how many of the latest are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Iteration of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, facts: Facts) -> None:
        """Save under the state's iteration; nothing happens if that is saved already."""
        iteration = int(state.iteration)
        if iteration == self.latest():
            return
        arrays = ocp.args.StandardSave(_by_name(state))
        self._manager.save(
            iteration, args=ocp.args.Composite(state=arrays, facts=ocp.args.JsonSave(facts))
        )
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[TrainState, Facts]:
        """The latest checkpoint, with the structure, types and placement of `like`.

        Raises:
            UsageError: an array is missing or has another shape: it is of another model.
        """
        names = _by_name(like)
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in names.items()
        }
        latest = self.latest()
        stored = self._manager.item_metadata(latest).state
        for name, wanted in abstract.items():
            found = stored.tree.get(name) if hasattr(stored, "tree") else stored.get(name)
            if found is None or tuple(found.shape) != wanted.shape:
                raise UsageError(
                    f"{self.folder / str(latest)}: {name} "
                    + ("is missing" if found is None else f"has shape {tuple(found.shape)}")
                    + f", but this model needs shape {wanted.shape}; resume with the model that "
                    "the run was started with."
                )
        restored = self._manager.restore(
            latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
            ),
        )
        leaves = [restored.state[name] for name in names]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored.facts

    def close(self) -> None:
        self._manager.close()


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
