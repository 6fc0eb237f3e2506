"""Checkpoints from which a run continues exactly: one folder each, complete or not there.

checkpoints/25/arrays/          the state's arrays, by Orbax, under the names of their places
               checkpoint.json  format; shape and checksum of each array; Orbax's files; the run's
                                notes; a checksum of all that

Every process writes the shards that its devices keep, and the first one the rest. A checkpoint says
nothing of shards: it is restored on any number of devices.

A checkpoint is written under another name and renamed once it is complete and on the disk. One that
was damaged later is noticed when it is restored, and passed over for the one before it. The arrays'
checksums are taken from memory, so that saving reads nothing back.

Arrays are written from where they are, and come back a portion at a time that is no larger than the
largest of them and takes the place of what was there: neither needs room for a second state.
"""

import errno
import json
import logging
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ppo_jax.files import PARTIAL, disk_errors, sync, sync_folder, write_json
from ppo_jax.hosts import is_first, on_first, together
from ppo_jax.runs.checksums import checksums
from qwen_env.errors import RunError, UsageError

Notes = dict[str, Any]
"""What else a run keeps in a checkpoint; JSON."""


class TrainingState(Protocol):
    """What training changes: a pytree of arrays."""

    @property
    def iteration(self) -> Any: ...

    @property
    def nonfinite_in_a_row(self) -> Any: ...


State = TypeVar("State", bound=TrainingState)

_FORMAT = 5  # goes up when a checkpoint holds something else than before
_SMALL = 2**16  # bytes; files beyond that hold arrays, which have checksums of their own


class Checkpoints:
    """The `checkpoints/` of a run folder.

    Args:
        folder: made when the first one is saved.
        keep: how many of the latest are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.resolve()
        self.keep = keep

    def sweep(self) -> None:
        """Remove what a killed save has left. Only for the run itself: another may be saving."""
        for unfinished in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def iterations(self) -> list[int]:
        """Iterations that were saved, ascending."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())

    def save(self, state: TrainingState, notes: Notes) -> None:
        """Save under the state's iteration, if that is not saved already, and remove the oldest.

        Raises:
            RunError: it cannot be written; what was saved before is still there.
        """
        complete = self.folder / str(int(state.iteration))
        if not on_first(complete.exists):
            try:
                _write(complete, _by_name(state), notes)
            except RunError:
                if is_first():
                    self.sweep()
                raise
        if is_first():
            for iteration in self.iterations()[: -self.keep]:
                shutil.rmtree(self.folder / str(iteration), ignore_errors=True)

    def restore(
        self, state: State, say: Callable[[str], None] = print, *, only: int | None = None
    ) -> tuple[State, Notes] | None:
        """The latest undamaged checkpoint, or None where none was ever saved.

        Args:
            state: gives the structure, types and placement of the arrays. They are deleted as
                those of the checkpoint are restored.
            only: the iteration to restore, and no other.
            say: is told of a damaged checkpoint, which is set aside once an earlier one is found.

        Raises:
            RunError: all checkpoints are damaged.
            UsageError: the latest is of another model or version.
        """
        arrays = _by_name(state)
        like = {name: _Place(array) for name, array in arrays.items()}
        damaged: list[Path] = []
        iterations = on_first(self.iterations) if only is None else [only]
        for iteration in reversed(iterations):
            folder = self.folder / str(iteration)
            try:
                content = _read_content_together(folder)
                _check_fits(folder, content["arrays"], like)
                restored = _read_arrays(folder, content["arrays"], like, arrays)
            except _Damaged as damage:
                say(f"The checkpoint {folder} is damaged: {damage}.")
                damaged.append(folder)
                continue
            on_first(partial(_set_aside, damaged))
            if damaged:
                say(f"Continuing from iteration {iteration} instead.")
            leaves = [restored[name] for name in arrays]
            return jax.tree.unflatten(jax.tree.structure(state), leaves), content["notes"]
        if damaged:
            raise RunError(
                f"Every checkpoint in {self.folder} is damaged, so the run cannot be resumed; "
                "start another one in another --output-dir."
            )
        return None


def _set_aside(damaged: Sequence[Path]) -> None:
    """Keep damaged checkpoints, under names that are taken for no checkpoint."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        with disk_errors(folder):
            folder.rename(aside)


class _Damaged(Exception):
    """What is wrong with a checkpoint's files."""


class _Place:
    """Where an array goes, without the array."""

    def __init__(self, array: jax.Array):
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        # Orbax commits arrays to their devices, and to jit that is another program.
        self.sharding = array.sharding if array.committed else None

    @property
    def restore_args(self) -> ocp.RestoreArgs:
        if self.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=self.dtype)
        return ocp.ArrayRestoreArgs(sharding=self.sharding, dtype=self.dtype)


@contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """Orbax, for the block. What it raises it does not print as well, in a dozen tracebacks."""
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level

    def hook_for_others(error: "sys.UnraisableHookArgs") -> None:
        if str(error.exc_value) != "Event loop is closed":
            hook(error)

    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook_for_others
    try:
        # Compressed, arrays would be 8 % smaller, take ten times as long, and a copy of the state.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            yield checkpointer
        sys.unraisablehook = hook
    except Exception:  # its threads go on for a while, and so the hook stays
        warnings.filterwarnings("ignore", r"coroutine 'async_serialize", RuntimeWarning)
        raise
    finally:
        log.setLevel(level)


def _write(complete: Path, arrays: Mapping[str, jax.Array], notes: Notes) -> None:
    """Write a checkpoint, and wait until it is on the disk."""
    folder = complete.with_name(complete.name + PARTIAL)

    def begin() -> None:
        with disk_errors(complete):
            folder.mkdir(parents=True)
            # Known before, for Orbax takes its time to find out.
            size = sum(array.nbytes for array in arrays.values())
            if shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save() -> None:
        with disk_errors(complete), _checkpointer() as checkpointer:
            checkpointer.save(folder / "arrays", ocp.args.PyTreeSave(arrays))

    def end() -> None:
        content = {
            "format": _FORMAT,
            "arrays": {
                name: {"shape": list(array.shape), "checksum": of_arrays[name]}
                for name, array in arrays.items()
            },
            "files": _files(folder / "arrays"),
            "notes": notes,
        }
        with disk_errors(complete):
            write_json(folder / "checkpoint.json", content | {"checksum": _seal(content)})
            sync(folder)
            folder.rename(complete)
            sync_folder(complete.parent)

    on_first(begin)
    together(save)
    of_arrays = checksums(arrays)
    on_first(end)


def _read_content_together(folder: Path) -> dict[str, Any]:
    """As `_read_content`, by the first process for all."""

    def content_or_damage() -> tuple[dict[str, Any] | None, str]:
        try:
            return _read_content(folder), ""
        except _Damaged as damage:
            return None, str(damage)

    content, damage = on_first(content_or_damage)
    if content is None:
        raise _Damaged(damage)
    return cast(dict[str, Any], content)


def _read_content(folder: Path) -> dict[str, Any]:
    """What `checkpoint.json` says.

    Raises:
        _Damaged: it is not what was written.
        UsageError: another version wrote it.
    """
    try:
        content = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        checksum = content.pop("checksum", None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged("checkpoint.json cannot be read") from error
    format = content.get("format", 1)
    has_no_checksum = checksum is None and format in (1, 2)
    if not has_no_checksum and checksum != _seal(content):
        raise _Damaged("checkpoint.json was changed or cut off after it was written")
    if format != _FORMAT:
        raise UsageError(
            f"{folder} has format {format}, but this version of ppo_jax reads format {_FORMAT}; "
            "resume with the version that the run was started with."
        )
    found = _files(folder / "arrays")
    for name, written in content["files"].items():
        if name not in found:
            raise _Damaged(f"arrays/{name} is missing")
        if found[name] != written:
            raise _Damaged(f"arrays/{name} was changed or cut off after it was written")
    return cast(dict[str, Any], content)


def _check_fits(
    folder: Path, found: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, _Place]
) -> None:
    for name in {**wanted, **found}:
        shape = tuple(found[name]["shape"]) if name in found else None
        if name not in wanted or shape != wanted[name].shape:
            saved = "is missing" if shape is None else f"has shape {shape}"
            needed = f"shape {wanted[name].shape}" if name in wanted else "none of that name"
            raise UsageError(
                f"{folder}: the array {name} {saved}, but this model needs {needed}; resume with "
                "the model that the run was started with."
            )


def _read_arrays(
    folder: Path,
    found: Mapping[str, Mapping[str, Any]],
    wanted: Mapping[str, _Place],
    replaced: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The arrays of a checkpoint; each portion of those that they replace is deleted for it.

    Raises:
        _Damaged: one cannot be read, or is not what was saved.
    """
    arrays: dict[str, jax.Array] = {}
    with _checkpointer() as checkpointer:
        for portion in _portions({name: place.nbytes for name, place in wanted.items()}):
            item = {name: 0 if name in portion else ocp.PLACEHOLDER for name in wanted}
            args = {name: place.restore_args for name, place in wanted.items()}
            try:
                read = checkpointer.restore(
                    folder / "arrays", ocp.args.PyTreeRestore(item, restore_args=args)
                )
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # of many kinds
                raise _Damaged(f"its arrays cannot be read ({type(error).__name__})") from error
            of_arrays = checksums({name: read[name] for name in portion})
            for name in portion:
                array = read.pop(name)
                if of_arrays[name] != found[name]["checksum"]:
                    raise _Damaged(f"the array {name} is not the one that was saved")
                replaced[name].delete()
                arrays[name] = jnp.array(array) if wanted[name].sharding is None else array
    return arrays


def _portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """All names in their order, each list's sizes together no more than the largest size."""
    portion: list[str] = []
    for name, size in sizes.items():
        if portion and sum(sizes[other] for other in portion) + size > max(sizes.values()):
            yield portion
            portion = []
        portion.append(name)
    yield portion


def _by_name(state: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _files(folder: Path) -> dict[str, list[int]]:
    """The size of each file in a folder and, where it is small, its checksum."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            checksum = [zlib.crc32(path.read_bytes())] if size <= _SMALL else []
            files[path.relative_to(folder).as_posix()] = [size, *checksum]
    return files


def _seal(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
