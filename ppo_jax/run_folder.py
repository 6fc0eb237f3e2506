"""The files of a run, apart from what its checkpoints and models hold.

config.json  metrics.jsonl  samples.jsonl  curves.png  tensorboard/
checkpoints/  best/  final/
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from ppo_jax.config import TrainConfig, as_json, from_json
from ppo_jax.curves import plot_curves
from qwen_env.errors import UsageError

Record = dict[str, Any]

_RECORDS = ("metrics.jsonl", "samples.jsonl")
_PARTIAL = ".partial"


class RunFolder:
    """A run's folder. Nothing is written before `create`.

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
        self._config = config
        self._files: dict[str, TextIO] = {}
        self._tensorboard: SummaryWriter | None = None
        if resume:
            _check_same(read_config(folder), config, folder)
        _check_usable(folder, resume=resume)

    def create(self) -> None:
        """Make the folder and write `config.json`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(as_json(self._config), indent=2) + "\n"
            _write(self.path / "config.json", text)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}.") from error

    def is_blank(self) -> bool:
        """Nothing was learnt yet: there is neither an iteration on record nor a checkpoint."""
        has_checkpoint = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        return not has_checkpoint and not _read_jsonl(self.path / "metrics.jsonl")

    def discard(self) -> None:
        """Remove the folder, so that a start that failed does not block the next."""
        shutil.rmtree(self.path, ignore_errors=True)

    def open(self, iteration: int) -> None:
        """Begin to write behind `iteration`; what an interrupted run wrote beyond it goes.

        Behind iteration 0 nothing is kept: the evaluation of the untrained model is made again.
        """
        for name in _RECORDS:
            path = self.path / name
            kept = [r for r in _read_jsonl(path) if iteration and r["iteration"] <= iteration]
            _write(path, "".join(map(_as_line, kept)))
            self._files[name] = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=iteration + 1)

    def write_metrics(self, metrics: Record) -> None:
        """A line of `metrics.jsonl`, and the same numbers for TensorBoard."""
        self._append("metrics.jsonl", [metrics])
        assert self._tensorboard is not None
        for name, value in metrics.items():
            if name != "iteration" and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, metrics["iteration"])

    def write_samples(self, samples: Sequence[Record]) -> None:
        """Lines of `samples.jsonl`."""
        self._append("samples.jsonl", samples)

    def last_samples(self) -> list[Record]:
        """The sampled completions of the last evaluation."""
        samples = _read_jsonl(self.path / "samples.jsonl")
        last = samples[-1]["iteration"]
        return [s for s in samples if s["iteration"] == last and s["decoding"] == "sampled"]

    def plot(self) -> Path:
        """Draw `curves.png` anew."""
        path = self.path / "curves.png"
        plot_curves(_read_jsonl(self.path / "metrics.jsonl"), path)
        return path

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, name: str, records: Sequence[Record]) -> None:
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
        raise UsageError(f"{path} is not the config of a run of this version: {error}.") from error


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
    if not resume and there == folder and any(p.suffix != _PARTIAL for p in folder.iterdir()):
        what = (
            "holds another run; add --resume to continue it, or choose"
            if (folder / "config.json").exists()
            else "is not empty and holds no run; choose"
        )
        raise UsageError(f"{folder} {what} another --output-dir.")


def _as_line(record: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: they become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def _read_jsonl(path: Path) -> list[Record]:
    """The records of a file that may not be there, or whose last line a crash cut off."""
    records: list[Record] = []
    if not path.exists():
        return records
    # Not splitlines: a model may well write other characters that end a line.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _write(path: Path, text: str) -> None:
    """Write a whole file or, if the process is killed meanwhile, nothing."""
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
