"""Each tracker against its own local store, read back through its own API."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled

from ppo_jax.config import TrackerName, TrainConfig, preset
from ppo_jax.runs.distributions import distributions_record
from ppo_jax.runs.folder import RunFolder
from ppo_jax.runs.trackers import Trackers
from qwen_env.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # of those packages, and of what they use


@pytest.fixture(autouse=True)
def local_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of these tests leaves the folder of the test."""
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


def logging_to(*names: TrackerName) -> TrainConfig:
    config = preset("pocket")
    return replace(config, run=replace(config.run, log_to=names))


def sample(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "decoding": "greedy",
        "prompt": "The plot",
        "completion": f" was {iteration}",
        "finish_reason": "eos",
        "score": 0.25,
        "components": {"score": 0.25, "gold": -1.0},
    }


def write(folder: RunFolder, *iterations: int) -> None:
    counts = np.arange(40)
    for iteration in iterations:
        folder.write_distributions(distributions_record(iteration, {"ratio": counts}))
        folder.write_metrics({"iteration": iteration, "objective/score": 0.5 * iteration})
        folder.write_samples([sample(iteration)])


@contextmanager
def opened(
    path: Path, said: list[str], config: TrainConfig, last: int | None = None
) -> Iterator[RunFolder]:
    """A new run or, with `last`, one that goes on after that iteration."""
    folder = RunFolder(path, config, resume=last is not None)
    with folder.locked():
        folder.begin(-1 if last is None else last, said.append)
        yield folder


def interrupted_and_resumed(name: TrackerName, path: Path) -> tuple[str, list[str]]:
    """Iterations 1 and 2, then again from 1 to 3; the run's id, and what was said."""
    pytest.importorskip(name, exc_type=ImportError)
    said: list[str] = []
    config = logging_to(name)
    with pytest.raises(KeyboardInterrupt), opened(path, said, config) as folder:
        write(folder, 1, 2)
        folder.plot()
        raise KeyboardInterrupt
    ids = json.loads((path / "trackers.json").read_text())
    with opened(path, said, config, last=1) as folder:
        write(folder, 2, 3)
    assert json.loads((path / "trackers.json").read_text()) == ids
    assert ids.keys() == {name}
    assert len(said) == 2, said
    assert all(line.startswith(f"Logging to {name}: ") for line in said)
    return ids[name], said


SCORES = {1: 0.5, 2: 1.0, 3: 1.5}


def test_trackio(tmp_path: Path) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        del sys.modules[module]
    name, _ = interrupted_and_resumed("trackio", tmp_path / "run")
    trackio = importlib.import_module("trackio")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    [run] = trackio.Api().runs("ppo_jax")
    assert run.name == name
    assert run.config["ppo"]["batch_size"] == preset("pocket").ppo.batch_size
    logs = storage.get_logs("ppo_jax", name)
    scores = {log["step"]: log["objective/score"] for log in logs if "objective/score" in log}
    assert scores == SCORES
    tables = [log["samples"]["_value"] for log in logs if "samples" in log]
    assert [row["completion"] for [row] in tables][-1] == " was 3"
    [histogram, *_] = [log["distribution/ratio"] for log in logs if "distribution/ratio" in log]
    assert histogram["values"] == list(range(40))
    assert any("curves" in log for log in logs)


def test_mlflow(tmp_path: Path) -> None:
    run_id, said = interrupted_and_resumed("mlflow", tmp_path / "run")
    mlflow = importlib.import_module("mlflow")
    assert f"{tmp_path}/mlflow.db" in said[0]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("ppo_jax").experiment_id
    [run] = client.search_runs([experiment])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (run_id, "FINISHED", "run")
    assert run.data.params["ppo.batch_size"] == str(preset("pocket").ppo.batch_size)
    history = client.get_metric_history(run_id, "objective/score")
    assert {point.step: point.value for point in history} == SCORES
    paths = [file.path for file in client.list_artifacts(run_id, "samples")]
    assert paths == [f"samples/00000{i}.json" for i in (1, 2, 3)]
    table = json.loads(Path(client.download_artifacts(run_id, paths[-1])).read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["completion"] == " was 3"
    assert json.loads(row["components"])["gold"] == -1
    assert "curves.png" in [file.path for file in client.list_artifacts(run_id)]


def test_wandb(tmp_path: Path) -> None:
    """Offline, without an account: two files, which are of one run."""
    run_id, said = interrupted_and_resumed("wandb", tmp_path / "run")
    assert "upload it with: wandb sync " in said[0]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2
    logs: list[dict[str, Any]] = []
    for file in files:
        records = wandb_records(file)
        [run] = [record.run for record in records if record.HasField("run")]
        assert (run.run_id, run.project, run.display_name) == (run_id, "ppo_jax", "run")
        config = {update.key: json.loads(update.value_json) for update in run.config.update}
        assert config["ppo"]["batch_size"] == preset("pocket").ppo.batch_size
        for record in records:
            if record.HasField("history"):
                log: dict[str, Any] = {}
                for item in record.history.item:
                    *outer, key = item.nested_key or [item.key]
                    inner = log
                    for name in outer:
                        inner = inner.setdefault(name, {})
                    inner[key] = json.loads(item.value_json)
                logs.append(log)
    scores = {log["iteration"]: log["objective/score"] for log in logs if "objective/score" in log}
    assert scores == SCORES
    tables = [log["samples"] for log in logs if "samples" in log]
    table = json.loads((files[-1].parent / "files" / tables[-1]["path"]).read_text())
    assert dict(zip(table["columns"], table["data"][0], strict=True))["completion"] == " was 3"
    assert any(log.get("curves", {}).get("_type") == "image-file" for log in logs)


def wandb_records(path: Path) -> list[Any]:
    """The protocol buffers of a .wandb file: after 7 bytes, LevelDB's log of 32 KiB blocks."""
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, place = path.read_bytes(), 7
    records, parts = [], b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(proto.Record.FromString(parts))
            parts = b""
    return records


# Without any of the packages.


class Stub:
    """A tracker whose n-th call fails."""

    run_id, where = "1", "stub: nowhere"

    def __init__(self, fails_at: int) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: Any, **__: Any) -> None:
            self.calls += 1
            if self.calls == self.fails_at:
                raise ConnectionError("no network")

        return call


def test_a_tracker_that_fails_is_told_of_once_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs = {"Wandb": Stub(fails_at=3), "MLflow": Stub(fails_at=99)}
    for kind, stub in stubs.items():
        monkeypatch.setattr(f"ppo_jax.runs.trackers.{kind}", lambda *_, stub=stub: stub)
    monkeypatch.setattr("ppo_jax.runs.folder.check_installed", lambda names: None)
    said: list[str] = []
    with opened(tmp_path / "run", said, logging_to("wandb", "mlflow")) as folder:
        write(folder, 1, 2, 3)
    assert said[2:] == ["wandb failed: ConnectionError: no network. The run goes on without it."]
    assert stubs["Wandb"].calls == 3
    assert stubs["MLflow"].calls == 3 * 3 + 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3


def test_a_tracker_that_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ppo_jax.runs.trackers.Wandb", fail)
    said: list[str] = []
    path = tmp_path / "trackers.json"
    Trackers(["wandb"], path, {}, said.append).tell(lambda to: to.write_scalars(1, {}))
    assert said == ["wandb failed: PermissionError: Permission denied. The run goes on without it."]
    assert not path.exists()


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is read or written."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyNotInstalled, match=f"run: pip install {name}$"):
        RunFolder(tmp_path / "run", logging_to(name), resume=False)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker() -> None:
    with pytest.raises(UsageError, match="must be one of 'trackio', 'wandb', 'mlflow'"):
        logging_to("comet")  # type: ignore[arg-type]
