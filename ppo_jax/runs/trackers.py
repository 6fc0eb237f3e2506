"""Experiment trackers beside a run's own files: `--log-to trackio wandb mlflow`.

Each is imported only where it is named, and where it writes is its own affair: environment
variables such as TRACKIO_SPACE_ID, WANDB_MODE or MLFLOW_TRACKING_URI say it. Without any of them,
all three stay on this machine.
"""

import contextlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ppo_jax.config import TrackerName
from ppo_jax.files import atomic, write_json
from qwen_env.errors import UserFacingError, reason
from qwen_env.extras import import_extra
from qwen_env.files import read_json

PROJECT = "ppo_jax"  # WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME and TRACKIO_PROJECT name another

Histograms = Mapping[str, tuple[np.ndarray, np.ndarray]]
Config = Mapping[str, Mapping[str, Any]]


class Tracker(Protocol):
    """What a run tells a tracker; what a tracker cannot show, it leaves out.

    Any method may raise anything: see `Trackers`.
    """

    run_id: str
    """What the tracker knows the run by, so that a resumed run goes on in the same place."""
    where: str
    """A sentence that says where to look."""

    def write_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """One number under each name."""

    def write_histograms(self, iteration: int, histograms: Histograms) -> None:
        """Under each name, the edges [bins + 1] of its bins and their heights [bins], none NaN."""

    def write_samples(self, iteration: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records of `samples.jsonl`, of one evaluation."""

    def write_picture(self, path: Path) -> None:
        """A PNG file, such as the curves."""

    def close(self, *, is_whole: bool) -> None:
        """The run is at its end or, if not `is_whole`, was interrupted."""


def check_installed(names: Sequence[TrackerName]) -> None:
    """Import what `names` name.

    Raises:
        gymnasium.error.DependencyNotInstalled: one is not installed.
    """
    for name in names:
        import_extra(name, name)


class Trackers:
    """All trackers of a run; one that fails is told of once, and left alone from then on.

    Args:
        names: of them.
        path: the file in the run folder that keeps what they know the run by. Where it does, their
            runs go on.
        config: the settings, as JSON has them.
        say: is told where to look, and what failed.
    """

    def __init__(
        self, names: Sequence[TrackerName], path: Path, config: Config, say: Callable[[str], None]
    ):
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        known: dict[str, str] = {}
        with self._without(str(path)):
            known = read_json(path)
        kinds: dict[str, Callable[..., Tracker]] = {
            "trackio": Trackio,
            "wandb": Wandb,
            "mlflow": MLflow,
        }
        for name in dict.fromkeys(names):
            with self._without(name):
                tracker = kinds[name](path.parent, config, known.get(name))
                self._trackers[name] = tracker
                say(f"Logging to {tracker.where}")
        ids = known | {name: tracker.run_id for name, tracker in self._trackers.items()}
        if ids != known:
            with self._without(str(path)), atomic(path) as partial:
                write_json(partial, ids)

    def tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell all of them."""
        for name, tracker in [*self._trackers.items()]:
            with self._without(name):
                what(tracker)

    @contextlib.contextmanager
    def _without(self, name: str) -> Iterator[None]:
        """Within the block, the failure of a tracker is told of, and no error."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            what = (
                str(error)
                if isinstance(error, UserFacingError)
                else f"{name} failed: {type(error).__name__}: {reason(error)}."
            )
            self._say(f"{what} The run goes on without it.")


class Trackio:
    """A run in trackio's local store, or in the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: Path, config: Config, run_id: str | None):
        self._trackio = import_extra("trackio", "trackio")
        # Trackio finds a run by its name, so that must be no other's.
        self.run_id = run_id or f"{folder.name}-{uuid.uuid4().hex[:8]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = self._trackio.init(
                project=project,
                name=self.run_id,
                config=dict(config),
                resume="never" if run_id is None else "allow",
                embed=False,
            )
        self.where = f"trackio: run {self.run_id}; see it with: trackio show --project {project}"

    def write_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=iteration)

    def write_histograms(self, iteration: int, histograms: Histograms) -> None:
        drawn = {
            name: self._trackio.Histogram(np_histogram=(heights, edges))
            for name, (edges, heights) in histograms.items()
        }
        self._run.log(drawn, step=iteration)

    def write_samples(self, iteration: int, samples: Sequence[Mapping[str, Any]]) -> None:
        columns, rows = _table(samples)
        self._run.log({"samples": self._trackio.Table(columns=columns, data=rows)}, step=iteration)

    def write_picture(self, path: Path) -> None:
        self._run.log({path.stem: self._trackio.Image(path)})

    def close(self, *, is_whole: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()  # forgets the run too, else it would finish it again at exit


class Wandb:
    """A run of Weights & Biases; offline, in wandb/ of the run folder, where nobody has logged in.

    Its steps only ever grow, and a resumed run may do iterations again: so `iteration` is a metric,
    and the horizontal axis of all others.
    """

    def __init__(self, folder: Path, config: Config, run_id: str | None):
        self._wandb = wandb = import_extra("wandb", "wandb")
        wandb.setup(wandb.Settings(silent=True))
        says_mode = "WANDB_MODE" in os.environ
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=run_id,
            resume="allow",
            dir=folder,
            config=dict(config),
            mode=None if says_mode or wandb.login(prompt=False) else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run_id = self._run.id
        self._run.config.update(dict(config), allow_val_change=True)
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        if self._run.offline:
            place = Path(self._run.dir).parent
            self.where = f"wandb: offline, in {place}; upload it with: wandb sync {place}"
        else:
            self.where = f"wandb: {self._run.url}"

    def write_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._log(iteration, dict(scalars))

    def write_histograms(self, iteration: int, histograms: Histograms) -> None:
        drawn = {
            name: self._wandb.Histogram(np_histogram=(heights, edges))
            for name, (edges, heights) in histograms.items()
        }
        self._log(iteration, drawn)

    def write_samples(self, iteration: int, samples: Sequence[Mapping[str, Any]]) -> None:
        columns, rows = _table(samples)
        self._log(iteration, {"samples": self._wandb.Table(columns=columns, data=rows)})

    def write_picture(self, path: Path) -> None:
        self._run.log({path.stem: self._wandb.Image(str(path))})

    def close(self, *, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)

    def _log(self, iteration: int, values: dict[str, Any]) -> None:
        self._run.log({"iteration": iteration, **values})


class MLflow:
    """A run in the store that MLFLOW_TRACKING_URI names, or in MLflow's own, mlflow.db."""

    def __init__(self, folder: Path, config: Config, run_id: str | None):
        mlflow = import_extra("mlflow", "mlflow")
        for logger in ("mlflow", "alembic"):  # they tell of each table of a new database
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._client = client = mlflow.MlflowClient()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = client.get_experiment_by_name(name)
            experiment = client.create_experiment(name) if found is None else found.experiment_id
            run_id = client.create_run(experiment, run_name=folder.name).info.run_id
            settings = {
                f"{group}.{name}": str(value)
                for group, fields in config.items()
                for name, value in fields.items()
            }
            params = [mlflow.entities.Param(*item) for item in settings.items()]
            client.log_batch(run_id, params=params)
        else:
            client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        self._metric = mlflow.entities.Metric
        self.where = f"mlflow: run {run_id} in {client.tracking_uri}"

    def write_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, x, now, iteration) for name, x in scalars.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def write_histograms(self, iteration: int, histograms: Histograms) -> None:
        """MLflow has none."""

    def write_samples(self, iteration: int, samples: Sequence[Mapping[str, Any]]) -> None:
        columns, rows = _table(samples)
        data = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        # A file an evaluation: to append to one, MLflow would fetch all that it holds.
        self._client.log_table(self.run_id, data, f"samples/{iteration:06}.json")

    def write_picture(self, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def close(self, *, is_whole: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if is_whole else "KILLED")


_COLUMNS = ("iteration", "decoding", "prompt", "completion", "finish_reason", "score", "components")


def _table(samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows; the components of a score, which have names of their own, as JSON."""
    rows = [
        [json.dumps(sample[name]) if name == "components" else sample[name] for name in _COLUMNS]
        for sample in samples
    ]
    return list(_COLUMNS), rows
