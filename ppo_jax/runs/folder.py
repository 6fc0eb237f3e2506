"""The files of a run, apart from what its checkpoints and models hold.

config.json  metrics.jsonl  distributions.jsonl  samples.jsonl  curves.png  tensorboard/
checkpoints/  best/  final/

distributions.jsonl holds, for each iteration, what single numbers would hide:

    ratio                counts of π_new / π_old over the tokens of all minibatches
    advantage            counts of advantages, in standard deviations from their mean
    length               counts of responses with 1, 2, ..., T tokens
    kl_by_position       log π_old - log π_ref, a mean over the batch: tokens 1, 2, ..., T
    entropy_by_position  likewise; null where no response is that long

The bins of the first two are `algorithm.RATIO_EDGES` and `algorithm.ADVANTAGE_EDGES`.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter

from ppo_jax.algorithm import ADVANTAGE_EDGES, RATIO_EDGES
from ppo_jax.config import TrainConfig, as_json, from_json
from ppo_jax.files import PARTIAL, atomic, disk_errors, write_json
from ppo_jax.runs.curves import plot_curves
from ppo_jax.runs.panels import Records
from qwen_env.errors import UsageError

Record = dict[str, Any]

_RECORDS = ("metrics.jsonl", "distributions.jsonl", "samples.jsonl")
_DIGITS = 5  # significant ones, of what distributions.jsonl holds


class RunFolder:
    """A run's folder. Nothing is written before `locked` and `create`.

    Args:
        folder: for a new run, it must be empty or not there.
        config: of this run; checked against the one of the run that is resumed.
        resume: continue the run that the folder holds.

    Raises:
        UsageError: the folder holds a run and `resume` is not set, or the other way round; it
            cannot be written; or the configs differ in a field that must not change within a run.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, resume: bool):
        self.path = folder
        self.checkpoints = folder / "checkpoints"
        self.best = folder / "best"
        self.final = folder / "final"
        self._config, self._resume = config, resume
        self._files: dict[str, TextIO] = {}
        self._tensorboard: SummaryWriter | None = None
        if resume:
            _check_same(read_config(folder), config, folder)
        _check_usable(folder, resume=resume)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes from it within the block.

        Raises:
            UsageError: another process has it, or has left a run in it meanwhile.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.path} is in use by another process; wait until it ends, or choose "
                    "another --output-dir."
                ) from None
            except OSError:  # a file system without locks
                pass
            _check_usable(self.path, resume=self._resume)
            yield
        finally:
            os.close(handle)

    def create(self) -> None:
        """Make the folder and write `config.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic(self.path / "config.json") as partial:
            write_json(partial, as_json(self._config))

    def is_blank(self) -> bool:
        """Nothing was learnt yet: there is neither an iteration on record nor a checkpoint."""
        has_checkpoint = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        return not has_checkpoint and not _read_jsonl(self.path / "metrics.jsonl")

    def discard(self) -> None:
        """Remove the folder, so that a start that failed does not block the next."""
        # With the slash, what a symbolic link names, and not the link.
        shutil.rmtree(f"{self.path}/", ignore_errors=True)

    def open(self, iteration: int, *, starts_anew: bool = False) -> None:
        """Begin to write after `iteration`; what an interrupted run wrote beyond it is dropped.

        Args:
            starts_anew: nothing is kept, for the untrained model is evaluated again.
        """
        for name in _RECORDS:
            path = self.path / name
            old = [] if starts_anew else _read_jsonl(path)
            kept = [record for record in old if record["iteration"] <= iteration]
            with atomic(path) as partial:
                partial.write_text("".join(map(_as_line, kept)), encoding="utf-8")
            self._files[name] = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=iteration + 1)

    def write_metrics(self, metrics: Record) -> None:
        """A line of `metrics.jsonl`, and the same numbers for TensorBoard."""
        self._append("metrics.jsonl", [metrics])
        assert self._tensorboard is not None
        for name, value in metrics.items():
            if name != "iteration" and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, metrics["iteration"])

    def write_distributions(self, record: Record) -> None:
        """A line of `distributions.jsonl`, made by `distributions_record`; and for TensorBoard.

        There the means by position are histograms too: position is the axis, the mean (0 where it
        is negative or unknown) the height.
        """
        self._append("distributions.jsonl", [record])
        assert self._tensorboard is not None
        for name, values in record.items():
            if name != "iteration":
                heights = np.maximum(np.array(values, float), 0.0)  # null becomes NaN
                histogram = _tensorboard_histogram(_edges(name, len(values)), heights)
                tag = f"distribution/{name}"
                self._tensorboard.add_histogram_raw(
                    tag, **histogram, global_step=record["iteration"]
                )

    def write_samples(self, samples: Sequence[Record]) -> None:
        """Lines of `samples.jsonl`."""
        self._append("samples.jsonl", samples)

    def last_samples(self) -> list[Record]:
        """The sampled completions of the last evaluation."""
        samples = _read_jsonl(self.path / "samples.jsonl")
        last = max((s["iteration"] for s in samples), default=0)
        return [s for s in samples if s["iteration"] == last and s["decoding"] == "sampled"]

    def plot(self) -> Path:
        """Draw `curves.png` anew."""
        path = self.path / "curves.png"
        with disk_errors(path):
            plot_curves(read_records(self.path), path)
        return path

    def close(self) -> None:
        """Close the files; the folder can be opened again."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk, which was told of before
                file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, name: str, records: Sequence[Record]) -> None:
        with disk_errors(self.path / name):
            self._files[name].write("".join(map(_as_line, records)))
            self._files[name].flush()


def read_config(folder: Path) -> TrainConfig:
    """The config of the run in `folder`.

    Raises:
        UsageError: there is no run, or its config cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no run to resume (no config.json); leave out --resume to start one."
        )
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        raise UsageError(f"{path} has no field {error}; another version wrote it.") from error
    except (ValueError, TypeError) as error:
        why = str(error).rstrip(".")
        raise UsageError(f"{path} is not the config of a run of this version: {why}.") from error


def read_records(folder: Path) -> Records:
    """What the curves of the run in `folder` are drawn from.

    Raises:
        UsageError: there is no run, or its config cannot be read.
    """
    ppo = read_config(folder).ppo
    high = ppo.clip_range if ppo.clip_range_high is None else ppo.clip_range_high
    return Records(
        metrics=_read_jsonl(folder / "metrics.jsonl"),
        distributions=_read_jsonl(folder / "distributions.jsonl"),
        clip_limits=(1 - ppo.clip_range, 1 + high),
    )


def distributions_record(iteration: int, distributions: Mapping[str, np.ndarray]) -> Record:
    """A record for `RunFolder.write_distributions`: JSON, apart from NaN, of a few digits."""
    rounded = {
        name: [float(f"{x:.{_DIGITS}g}") if isinstance(x, float) else x for x in array.tolist()]
        for name, array in distributions.items()
    }
    return {"iteration": iteration, **rounded}


def _edges(name: str, count: int) -> np.ndarray:
    """The outer and inner edges of the bins of a distribution; of positions, halfway between."""
    by_name = {"ratio": RATIO_EDGES, "advantage": ADVANTAGE_EDGES}
    return by_name.get(name, np.arange(count + 1) + 0.5)


def _tensorboard_histogram(edges: np.ndarray, heights: np.ndarray) -> dict[str, Any]:
    heights = np.nan_to_num(heights)
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "min": edges[0],
        "max": edges[-1],
        "num": heights.sum(),
        "sum": (heights * middles).sum(),
        "sum_squares": (heights * middles**2).sum(),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": heights.tolist(),
    }


_MAY_CHANGE = {"num_iterations", "eval_every", "eval_size", "save_every", "keep_checkpoints"}


def _check_same(saved: TrainConfig, given: TrainConfig, folder: Path) -> None:
    old, new = as_json(saved), as_json(given)
    for group, fields in new.items():
        for name, value in fields.items():
            if value != old[group][name] and name not in _MAY_CHANGE:
                raise UsageError(
                    f"{folder} holds a run with {name} = {old[group][name]!r}, not {value!r}; "
                    "resume it without that flag, or start another run in another --output-dir."
                )


def _check_usable(folder: Path, *, resume: bool) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file, not a folder; choose another --output-dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{there} is not writable; choose another --output-dir.")
    # A start that was killed as it wrote its first file left that one, and no run.
    if not resume and there == folder and any(p.suffix != PARTIAL for p in folder.iterdir()):
        what = (
            "holds another run; add --resume to continue it, or choose"
            if (folder / "config.json").exists()
            else "is not empty and holds no run; choose"
        )
        raise UsageError(f"{folder} {what} another --output-dir.")


def _as_line(record: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: they become null."""
    return json.dumps({k: _finite(v) for k, v in record.items()}, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_jsonl(path: Path) -> list[Record]:
    """The records of a file that may not be there, or whose last line a crash cut off."""
    records: list[Record] = []
    if not path.exists():
        return records
    # Not splitlines: a model may well write other characters that end a line.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "iteration" not in record:
            raise UsageError(f"line {number} of {path} has no iteration; mend or remove it.")
        records.append(record)
    return records
