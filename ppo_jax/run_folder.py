"""The files of a run, apart from its checkpoints and models.

config.json  metrics.jsonl  samples.jsonl  curves.png  tensorboard/
checkpoints/  best/  final/
"""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from ppo_jax.config import TrainConfig, as_json, from_json
from ppo_jax.curves import plot_curves
from qwen_env.errors import UsageError

Record = dict[str, Any]


class RunFolder:
    """A run's folder. Nothing is written before `create`.

    Args:
        folder: for a new run, it must be empty or not there.
        config: of this run; checked against the one of the run that is resumed.
        resume: continue the run that the folder holds.

    Raises:
        UsageError: the folder holds a run and `resume` is not set, or the other way round; or the
            configs differ in a field that must not change within a run.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, resume: bool):
        self.path = folder
        if resume:
            _check_same(read_config(folder), config, folder)
        elif folder.is_file():
            raise UsageError(f"{folder} is a file; choose another --output-dir.")
        elif folder.exists() and any(folder.iterdir()):
            raise UsageError(
                f"{folder} is not empty; add --resume to continue the run it holds, or choose "
                "another --output-dir."
            )
        self._files: dict[str, Any] = {}

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write `config.json`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be made: {error.strerror}.") from error
        (self.path / "config.json").write_text(json.dumps(as_json(config), indent=2) + "\n")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def open(self, iteration: int) -> None:
        """Begin to write behind `iteration`; what an interrupted run wrote beyond it goes."""
        self._files = {
            name: _continue(self.path / name, iteration)
            for name in ("metrics.jsonl", "samples.jsonl")
        }
        purge = {"purge_step": iteration + 1} if iteration else {}
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), **purge)

    def write_metrics(self, metrics: Record) -> None:
        self._append("metrics.jsonl", metrics)
        for name, value in metrics.items():
            if name != "iteration":
                self._tensorboard.add_scalar(name, value, metrics["iteration"])

    def write_samples(self, samples: list[Record]) -> None:
        for sample in samples:
            self._append("samples.jsonl", sample)

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
        if self._files:
            self._tensorboard.close()

    def _append(self, name: str, record: Record) -> None:
        self._files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
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
        return from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is not the config of a run of this version: {error}.") from error


_MAY_CHANGE = {"eval_every", "eval_size", "save_every", "keep_checkpoints", "num_iterations"}


def _check_same(saved: TrainConfig, given: TrainConfig, folder: Path) -> None:
    old, new = as_json(saved), as_json(given)
    for group, fields in new.items():
        for name, value in fields.items():
            if value != old[group][name] and name not in _MAY_CHANGE:
                raise UsageError(
                    f"{folder} holds a run with {name} = {old[group][name]!r}, not {value!r}; "
                    f"resume it without that flag, or start another --output-dir."
                )


def _continue(path: Path, iteration: int) -> Any:
    kept = [r for r in _read_jsonl(path) if r["iteration"] <= iteration] if path.exists() else []
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path.open("a", encoding="utf-8")


def _read_jsonl(path: Path) -> list[Record]:
    """The records of a file whose last line may have been cut off by a crash."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
