"""Checkpoints from which a run continues exactly: one folder each, complete or not there.

checkpoints/25/arrays/          the state's arrays, by Orbax, under the names of their places
               checkpoint.json  format, metadata other than arrays (the best score), array shapes
               manifest.json    a digest of every other file

A checkpoint is written under another name and renamed once it is complete. Its digests are checked
before it is read, so one that was damaged later is passed over for the one before it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ppo_jax.files import PARTIAL, disk_errors, write_json
from ppo_jax.learning.learner import TrainState
from qwen_env.errors import RunError, UsageError

Metadata = dict[str, Any]

_FORMAT = 2  # goes up when a state holds other arrays than before


class Checkpoints:
    """The `checkpoints/` of a run folder.

    Args:
        folder: made when the first one is saved.
        keep: how many of the latest are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.resolve()
        self.keep = keep
        for partial in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(partial)

    def iterations(self) -> list[int]:
        """Iterations that were saved, ascending."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())

    def save(self, state: TrainState, metadata: Metadata) -> None:
        """Save under the state's iteration; nothing happens if that is saved already.

        Raises:
            RunError: it cannot be written; what was saved before is still there.
        """
        complete = self.folder / str(int(state.iteration))
        if complete.exists():
            return
        arrays = _by_name(state)
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        partial = complete.with_name(complete.name + PARTIAL)
        content = {"format": _FORMAT, "metadata": metadata, "shapes": shapes}
        try:
            with disk_errors(complete):
                self.folder.mkdir(parents=True, exist_ok=True)
                # Known before, for Orbax prints a dozen tracebacks when it fails.
                size = sum(array.nbytes for array in arrays.values())
                if shutil.disk_usage(self.folder).free < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(partial / "arrays", arrays)
                write_json(partial / "checkpoint.json", content)
                write_json(partial / "manifest.json", _digests(partial))
                partial.rename(complete)
        except RunError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for iteration in self.iterations()[: -self.keep]:
            shutil.rmtree(self.folder / str(iteration))

    def restore(
        self, like: TrainState, say: Callable[[str], None] = print
    ) -> tuple[TrainState, Metadata] | None:
        """The latest undamaged checkpoint, or None where none was ever saved.

        Args:
            like: gives the structure, types and placement of the arrays.
            say: is told of a damaged checkpoint, which is removed once an earlier one is found.

        Raises:
            RunError: all checkpoints are damaged.
            UsageError: the latest is of another model or version.
        """
        saved = self.iterations()
        damaged: list[int] = []
        while saved and (what := _damage(self.folder / str(saved[-1]))):
            say(f"The checkpoint {self.folder / str(saved[-1])} is damaged: {what}.")
            damaged.append(saved.pop())
        if damaged and not saved:
            raise RunError(
                f"Every checkpoint in {self.folder} is damaged, so the run cannot be resumed; "
                "start another one in another --output-dir."
            )
        if not saved:
            return None
        for iteration in damaged:
            shutil.rmtree(self.folder / str(iteration))
        if damaged:
            say(f"Continuing from iteration {saved[-1]} instead.")
        return _read(self.folder / str(saved[-1]), like)


def _read(folder: Path, like: TrainState) -> tuple[TrainState, Metadata]:
    content = json.loads((folder / "checkpoint.json").read_text())
    if (format := content.get("format", 1)) != _FORMAT:
        raise UsageError(
            f"{folder} has format {format}, but this version of ppo_jax reads format {_FORMAT}; "
            "resume with the version that the run was started with."
        )
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in _by_name(like).items()
    }
    found: dict[str, list[int]] = content["shapes"]
    for name in wanted | found:
        if name not in found or name not in wanted or tuple(found[name]) != wanted[name].shape:
            saved = f"has shape {tuple(found[name])}" if name in found else "is missing"
            needed = f"shape {wanted[name].shape}" if name in wanted else "none of that name"
            raise UsageError(
                f"{folder}: the array {name} {saved}, but this model needs {needed}; resume with "
                "the model that the run was started with."
            )
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder / "arrays", wanted)
    # Orbax commits arrays to their devices, and to jit that is another program: copies of them are
    # as free as those they replace.
    leaves = [
        arrays[name] if x.committed else jnp.array(np.asarray(arrays[name]))
        for name, x in _by_name(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), content["metadata"]


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _digests(folder: Path) -> dict[str, str]:
    """A digest of each file below `folder`, except the manifest."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "manifest.json":
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return digests


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint."""
    try:
        expected = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json cannot be read"
    found = _digests(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} was changed or cut off after it was written"
    return None
