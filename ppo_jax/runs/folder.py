"""The files of a run, apart from what its checkpoints and models hold.

config.json  solvable.json  metrics.jsonl  distributions.jsonl  samples.jsonl  tokens.jsonl
curves.png  tensorboard/  trackers.json  checkpoints/  best/  final/

A run ends where its checkpoints or models cannot be written. Where its records, its curves or its
TensorBoard files cannot be, or a tracker fails, it says so once and goes on.
"""

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import jax

from ppo_jax.algorithm import clip_limits
from ppo_jax.config import RunSettings, TrainConfig
from ppo_jax.files import PARTIAL, disk_errors, locked, sweep
from ppo_jax.hosts import is_first, on_first, together
from ppo_jax.runs.config_file import (
    Settings,
    check_same,
    check_unedited,
    other_versions,
    read_config,
    settings,
    write_config,
)
from ppo_jax.runs.curves import plot_curves
from ppo_jax.runs.distributions import as_histogram
from ppo_jax.runs.panels import Records
from ppo_jax.runs.records import BACKUP, Record, RecordFile
from ppo_jax.runs.tensorboard import TensorBoard
from ppo_jax.runs.trackers import Tracker, Trackers, check_installed
from qwen_env.errors import UsageError, UserFacingError

_METRICS, _DISTRIBUTIONS = "metrics.jsonl", "distributions.jsonl"
_SAMPLES, _TOKENS = "samples.jsonl", "tokens.jsonl"
_RECORDS = (_METRICS, _DISTRIBUTIONS, _SAMPLES, _TOKENS)
_SOLVABLE, _TRACKERS = "solvable.json", "trackers.json"
FRONTIER = "frontier.json"
"""What ppo-frontier found of a run's task, which the curves are then drawn against."""
_SEEN_WITHIN = 60.0  # seconds
_NAMES = (
    "config.json",
    _SOLVABLE,
    *_RECORDS,
    "curves.png",
    FRONTIER,
    "tensorboard",
    _TRACKERS,
    "wandb",
    "checkpoints",
    "best",
    "final",
)
_SUFFIXES = ("", PARTIAL, BACKUP, BACKUP + PARTIAL)


class RunFolder:
    """A run's folder. Nothing is written before `locked`.

    Args:
        folder: for a new run, it must be empty or not there.
        config: of this run; checked against the one of the run that is resumed.
        resume: continue the run that the folder holds.
        argv: the command line's words. What they name may differ from what a checkpoint says.

    Raises:
        UsageError: the folder holds a run and `resume` is not set, or the other way round; it
            cannot be written; or the configs differ in a field that must not change within a run.
    """

    def __init__(
        self, folder: Path, config: RunSettings, *, resume: bool, argv: Sequence[str] = ()
    ):
        self.path = folder
        self.checkpoints = folder / "checkpoints"
        self.best = folder / "best"
        self.final = folder / "final"
        self.solvable = folder / _SOLVABLE
        self._config, self._resume, self._argv = config, resume, argv
        self._records = {name: RecordFile(folder / name) for name in _RECORDS}
        self._tensorboard: TensorBoard | None = None
        self._trackers: Trackers | None = None
        self._say: Callable[[str], None] = print
        self._told: set[Path] = set()  # of what cannot be written
        self._check()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes from it within the block.

        What a killed process left unfinished is swept away. If the block raises before a new run
        has learnt anything, all that it wrote is removed, so that it does not block the next start.

        Raises:
            UsageError: another process has the folder, or has left a run in it meanwhile; or the
                records of the run are damaged.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path) as is_ours:
            if is_ours is False:
                raise UsageError(
                    f"{self.path} is in use by another process; wait until it ends, or choose "
                    "another --output-dir."
                )
            _check_usable(self.path, resume=self._resume)
            for file in self._records.values():
                file.read()
            for path in self._own_paths():
                if path.suffix == PARTIAL:
                    _remove(path)
            with disk_errors(self.path):
                sweep(self.best)
                sweep(self.final)
            try:
                yield
            except BaseException:
                self.close(is_whole=False)
                if not self._resume and not self._has_learnt():
                    for path in self._own_paths():
                        _remove(path)
                    for folder in missing:
                        with suppress(OSError):  # it holds something else meanwhile
                            folder.rmdir()
                raise
            self.close()

    def begin(self, last: int, say: Callable[[str], None]) -> None:
        """Write `config.json`, and begin to record what comes after iteration `last`.

        What an interrupted run recorded beyond it is cut off.

        Args:
            last: iteration 0 is the evaluation of the untrained model; with -1 nothing stays.
            say: is told of what cannot be written, and of what is missing.

        Raises:
            RunError: the folder cannot be written.
        """
        self._say = say
        if self._resume and (changes := other_versions(self.path)):
            say(
                f"The run was started with other versions ({'; '.join(changes)}): it goes on, but "
                "not bit for bit as it would have."
            )
        with disk_errors(self.path):
            write_config(self.path, self._config, self._argv)
        is_of_ppo = isinstance(self._config, TrainConfig)
        expected = (_METRICS, _DISTRIBUTIONS) if is_of_ppo else (_METRICS,)
        for name, file in self._records.items():
            missing = set(range(1, last + 1)) - set(file.open(last))
            if missing and name in expected:
                say(f"{file.path} has no record of {len(missing)} of {last} iterations.")
        with self._going_on(self.path / "tensorboard"):
            self._tensorboard = TensorBoard(self.path / "tensorboard", after=last)
        tracked = self._config.run.log_to
        self._trackers = Trackers(tracked, self.path / _TRACKERS, settings(self._config), say)

    def check_unedited(self, checkpoint: Settings) -> None:
        """Check `config.json` against the settings in a checkpoint.

        Raises:
            UsageError: one was edited, and is not named on the command line.
        """
        check_unedited(self.path, checkpoint, self._config, self._argv)

    def write_metrics(self, metrics: Record) -> None:
        """A line of `metrics.jsonl`, and the same numbers for TensorBoard."""
        self._append(_METRICS, [metrics])
        numbers = {
            name: value
            for name, value in metrics.items()
            if name != "iteration" and math.isfinite(value)
        }
        self._track(lambda to: to.write_scalars(metrics["iteration"], numbers))
        self._tell(lambda to: to.write_scalars(metrics["iteration"], numbers))

    def write_distributions(self, record: Record) -> None:
        """A line of `distributions.jsonl`, and the same as histograms for TensorBoard."""
        self._append(_DISTRIBUTIONS, [record])
        histograms = {
            f"distribution/{name}": as_histogram(name, values)
            for name, values in record.items()
            if name != "iteration"
        }
        self._track(lambda to: to.write_histograms(record["iteration"], histograms))
        self._tell(lambda to: to.write_histograms(record["iteration"], histograms))

    def write_samples(self, samples: Sequence[Record]) -> None:
        """Lines of `samples.jsonl`, all of one evaluation."""
        self._append(_SAMPLES, samples)
        if samples:
            self._tell(lambda to: to.write_samples(samples[0]["iteration"], samples))

    def write_tokens(self, record: Record) -> None:
        """A line of `tokens.jsonl`."""
        self._append(_TOKENS, [record])

    def last_samples(self) -> list[Record]:
        """Those of the last evaluation that is on record."""
        samples: list[Record] = []
        with self._going_on(self.path / _SAMPLES):
            samples = self._records[_SAMPLES].read()
        last = max((s["iteration"] for s in samples), default=0)
        return [s for s in samples if s["iteration"] == last]

    def evaluated_after(self, iteration: int) -> bool:
        """Whether an evaluation of a later iteration is on record."""
        return any(s["iteration"] > iteration for s in self._records[_SAMPLES].read())

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        for file in self._records.values():
            with self._going_on(file.path):
                file.sync()

    def plot(self) -> Path:
        """Draw `curves.png` anew."""
        path = self.path / "curves.png"
        with self._going_on(path), disk_errors(path):
            plot_curves(read_records(self.path, type(self._config)), path)
        return path

    def close(self, *, is_whole: bool = True) -> None:
        """Close the files, after a last try to write what could not be written before.

        Args:
            is_whole: the run is at its end, and was not interrupted.
        """
        self.sync()
        for file in self._records.values():
            if lost := file.close():
                self._say(f"{lost} records could not be written to {file.path}, and are lost.")
        if self._tensorboard is not None:
            self._tensorboard.close()
        if (curves := self.path / "curves.png").exists():
            self._tell(lambda to: to.write_picture(curves))
        self._tell(lambda to: to.close(is_whole=is_whole))
        self._trackers = None

    def _check(self) -> None:
        check_installed(self._config.run.log_to)
        if self._resume:
            check_same(self.path, self._config)
        _check_usable(self.path, resume=self._resume)

    def _append(self, name: str, records: Sequence[Record]) -> None:
        with self._going_on(self.path / name, "The run goes on, and tries again next time."):
            self._records[name].append(records)

    def _track(self, write: Callable[[TensorBoard], None]) -> None:
        if (tracker := self._tensorboard) is None:
            return
        self._tensorboard = None
        with self._going_on(self.path / "tensorboard"):
            write(tracker)
            self._tensorboard = tracker
        if self._tensorboard is None:
            tracker.close()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        if self._trackers is not None:
            self._trackers.tell(what)

    @contextmanager
    def _going_on(
        self, path: Path, meanwhile: str = "The run goes on without it."
    ) -> Iterator[None]:
        """Within the block, failing to write `path` is told of once, and no error."""
        try:
            with disk_errors(path):
                yield
        except Exception as error:
            if path in self._told:
                return
            self._told.add(path)
            what = (
                str(error)
                if isinstance(error, UserFacingError)
                else f"{path} cannot be written: {type(error).__name__}: {error}."
            )
            self._say(f"{what} {meanwhile}")

    def _has_learnt(self) -> bool:
        """Whether there is a checkpoint, or an iteration on record."""
        metrics = self._records[_METRICS].path
        return any(path.name.isdecimal() for path in self.checkpoints.glob("*")) or (
            metrics.exists() and metrics.stat().st_size > 0
        )

    def _own_paths(self) -> Iterator[Path]:
        """What a run may have written to its folder, unfinished things included."""
        paths = (self.path / f"{name}{suffix}" for name in _NAMES for suffix in _SUFFIXES)
        return filter(Path.exists, paths)


class GuestFolder(RunFolder):
    """A run's folder to a process that is not the first: it reads, and leaves writing to that."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def _check(self) -> None: ...

    def begin(self, last: int, say: Callable[[str], None]) -> None: ...

    def write_metrics(self, metrics: Record) -> None: ...

    def write_distributions(self, record: Record) -> None: ...

    def write_samples(self, samples: Sequence[Record]) -> None: ...

    def write_tokens(self, record: Record) -> None: ...

    def last_samples(self) -> list[Record]:
        return []

    def sync(self) -> None: ...

    def plot(self) -> Path:
        return self.path / "curves.png"


@contextmanager
def open_folder(
    folder: Path, config: RunSettings, *, resume: bool, argv: Sequence[str] = ()
) -> Iterator[RunFolder]:
    """The folder of a run, locked within the block; all processes open it, and the first writes.

    Raises:
        UsageError: as `RunFolder` and its lock do, or a process does not see the first one's files.
    """
    kind = RunFolder if is_first() else GuestFolder
    with ExitStack() as stack:
        opened: list[RunFolder] = []

        def enter() -> None:
            opened.append(kind(folder, config, resume=resume, argv=argv))
            stack.enter_context(opened[0].locked())

        together(enter)
        _check_seen_by_all(folder)
        yield opened[0]


def _check_seen_by_all(folder: Path) -> None:
    marker = folder / f"{on_first(lambda: uuid.uuid4().hex)}{PARTIAL}"

    def look() -> None:
        since = time.monotonic()
        while not marker.exists():  # network file systems take their time
            if time.monotonic() - since > _SEEN_WITHIN:
                raise UsageError(
                    f"{folder} is not the folder that process 0 has under that name; choose an "
                    "--output-dir on a file system that all processes share."
                )
            time.sleep(0.1)

    if jax.process_count() > 1:
        on_first(lambda: marker.write_text(""))
        try:
            together(look)
        finally:
            if is_first():
                marker.unlink(missing_ok=True)


def read_records(folder: Path, kind: type[RunSettings] = TrainConfig) -> Records:
    """What the curves of the run in `folder`, with settings of that kind, are drawn from.

    Raises:
        UsageError: there is no run, or its config or its records cannot be read.
    """
    config = read_config(folder, kind)
    records = Records(
        metrics=RecordFile(folder / _METRICS).read(),
        distributions=RecordFile(folder / _DISTRIBUTIONS).read(),
    )
    if not isinstance(config, TrainConfig):
        return records
    low, high = clip_limits(config.ppo.clip_range, config.ppo.clip_range_high)
    limits = float(low), float(high)
    return records._replace(clip_limits=limits, frontier=_read_frontier(folder / FRONTIER))


def _read_frontier(path: Path) -> Record | None:
    if not path.exists():
        return None
    try:
        frontier: Record = json.loads(path.read_text())
    except ValueError:
        raise UsageError(f"{path} is no JSON; remove it, or let ppo-frontier write it.") from None
    return frontier


def read_samples(folder: Path) -> list[Record]:
    """The completions of all evaluations of the run in `folder`. Errors as in `read_records`."""
    return RecordFile(folder / _SAMPLES).read()


def read_tokens(folder: Path) -> list[Record]:
    """What the run in `folder` has kept of tokens, see `ppo_jax.inspector.tokens`; none where it
    has kept none. Errors as in `read_records`."""
    return RecordFile(folder / _TOKENS).read()


def _check_usable(folder: Path, *, resume: bool) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file, not a folder; choose another --output-dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{there} is not writable; choose another --output-dir.")
    # A start that was killed before config.json was whole left these, and no run.
    first_writes = {_SOLVABLE, f"{_SOLVABLE}{PARTIAL}", f"config.json{PARTIAL}"}
    names = {path.name for path in folder.iterdir()} if there == folder else set()
    if not resume and names - first_writes:
        what = (
            "holds another run; add --resume to continue it, or choose"
            if (folder / "config.json").exists()
            else "is not empty and holds no run; choose"
        )
        raise UsageError(f"{folder} {what} another --output-dir.")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
