import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto

from ppo_jax.config import TrainConfig, preset
from ppo_jax.runs.config_file import read_config
from ppo_jax.runs.distributions import distributions_record
from ppo_jax.runs.folder import RunFolder, read_records
from ppo_jax.runs.tensorboard import TensorBoard
from qwen_env.errors import UsageError

CONFIG = preset("pocket")


RECORDS = ("metrics.jsonl", "distributions.jsonl", "samples.jsonl")


def metrics(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "objective/score": 0.5 * iteration}


def distributions(iteration: int) -> dict[str, Any]:
    arrays = {
        "ratio": np.eye(40, dtype=np.int32)[20] * 7,
        "advantage": np.arange(40),
        "length": np.array([0, 4, 1]),
        "kl_by_position": np.array([0.123456789, -2.0, np.nan], np.float32),
    }
    return distributions_record(iteration, arrays)


def sample(iteration: int, text: str = "x") -> dict[str, Any]:
    return {"iteration": iteration, "decoding": "sampled", "completion": text}


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().split("\n")[:-1]]


@contextmanager
def started(folder: Path, config: TrainConfig = CONFIG) -> Iterator[RunFolder]:
    new = RunFolder(folder, config, resume=False)
    with new.locked():
        new.begin(-1, pytest.fail)
        yield new


@contextmanager
def resumed(
    folder: Path, last: int, said: list[str] | None = None, config: TrainConfig = CONFIG
) -> Iterator[RunFolder]:
    """After iteration `last`. Nothing is to be said, unless there is a list for it."""
    again = RunFolder(folder, config, resume=True)
    with again.locked():
        again.begin(last, pytest.fail if said is None else said.append)
        yield again


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with three iterations on record."""
    with started(tmp_path / "run") as folder:
        folder.write_samples([sample(0)])
        for iteration in (1, 2, 3):
            folder.write_distributions(distributions(iteration))
            folder.write_metrics(metrics(iteration))
            folder.write_samples([sample(iteration)])
    return folder.path


def test_nothing_is_written_before_locked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b", CONFIG, resume=False)
    assert list(tmp_path.iterdir()) == []
    with folder.locked():
        folder.begin(-1, pytest.fail)
        assert read_config(tmp_path / "a" / "b") == CONFIG


@pytest.mark.parametrize("iteration", [0, 1, 2, 3])
def test_what_lies_beyond_is_cut_off_and_kept_beside(run: Path, iteration: int) -> None:
    before = {name: (run / name).read_bytes() for name in RECORDS}
    # The evaluation before the first iteration is made again if the run starts again.
    with resumed(run, iteration or -1) as folder:
        folder.write_distributions(distributions(iteration + 1))
        folder.write_metrics(metrics(iteration + 1))
    for name in RECORDS:
        whole, backup = before[name], run / f"{name}.bak"
        assert backup.exists() == (iteration < 3)
        assert not backup.exists() or backup.read_bytes() == whole
        assert whole.startswith((run / name).read_bytes()[: len(whole)]), "nothing is rewritten"
    for name in ("metrics.jsonl", "distributions.jsonl"):
        kept = [record["iteration"] for record in records(run, name)]
        assert kept == [*range(1, iteration + 1), iteration + 1]
    kept = [s["iteration"] for s in records(run, "samples.jsonl")]
    assert kept == (list(range(iteration + 1)) if iteration else [])


def test_samples_of_the_untrained_model_stay_where_they_are_not_made_again(run: Path) -> None:
    """As after an evaluation of iteration 1 that failed."""
    with resumed(run, 0):
        pass
    assert [s["iteration"] for s in records(run, "samples.jsonl")] == [0]
    assert records(run, "metrics.jsonl") == []


def test_samples_that_are_gone(run: Path) -> None:
    (run / "samples.jsonl").unlink()
    with resumed(run, 3) as folder:
        assert folder.last_samples() == []


def test_records_that_are_gone_are_told_of(run: Path) -> None:
    """As where somebody removed a damaged line."""
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::2]))
    said: list[str] = []
    with resumed(run, 3, said):
        pass
    assert said == [f"{path} has no record of 1 of 3 iterations."]


def test_whatever_a_model_writes_stays_one_record(run: Path) -> None:
    wild = "a\u2028b\x85c\x1cd\ne\r\x00\x1b[31m \ufffd"
    with resumed(run, 3) as folder:
        folder.write_metrics(metrics(4))
        folder.write_distributions(distributions(4))
        folder.write_samples([sample(4, wild)])
    with resumed(run, 4) as folder:
        assert folder.last_samples() == [sample(4, wild)]
    text = (run / "samples.jsonl").read_text()
    assert len(text.splitlines()) == 5, "nor does another reader see more lines"


def test_numbers_that_json_lacks_become_null(run: Path) -> None:
    odd = sample(4) | {"components": {"format": float("nan"), "parts": [float("inf"), 1.0]}}
    with resumed(run, 3) as folder:
        folder.write_metrics(metrics(4) | {"policy/loss": float("nan"), "kl": float("inf")})
        folder.write_samples([odd])
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (run / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
    assert records(run, "samples.jsonl")[-1]["components"] == {"format": None, "parts": [None, 1.0]}
    assert records(run, "metrics.jsonl")[-1] == metrics(4) | {"policy/loss": None, "kl": None}


def test_distributions_are_short_and_have_no_nan(run: Path) -> None:
    record = records(run, "distributions.jsonl")[1]
    assert record == {
        "iteration": 2,
        "ratio": [0] * 20 + [7] + [0] * 19,
        "advantage": list(range(40)),
        "length": [0, 4, 1],
        "kl_by_position": [0.12346, -2.0, None],
    }
    # What a checkpoint keeps of it comes back the same.
    before = json.loads(json.dumps(distributions(4)))
    with resumed(run, 3) as folder:
        folder.write_distributions(before)
    assert records(run, "distributions.jsonl")[3] == record | {"iteration": 4}


def test_tensorboard_holds_the_distributions(run: Path) -> None:
    histograms = {(v.tag, step): v.histo for step, v in tensorboard_values(run) if v.histo.num}
    names = {"ratio", "advantage", "length", "kl_by_position"}
    assert histograms.keys() == {(f"distribution/{n}", step) for n in names for step in (1, 2, 3)}

    def bars(name: str) -> dict[float, float]:
        """Upper edges of the bins that hold something."""
        histogram: HistogramProto = histograms[f"distribution/{name}", 2]
        bins = zip(histogram.bucket_limit, histogram.bucket, strict=True)
        return {round(edge, 6): count for edge, count in bins if count}

    assert bars("ratio") == {1.05: 7}, "no move is in the bin [1, 1.05)"
    assert bars("advantage")[5.0] == 39
    assert bars("length") == {2.5: 4, 3.5: 1}
    assert bars("kl_by_position") == {1.5: pytest.approx(0.12346)}
    lengths = histograms["distribution/length", 2]
    assert (lengths.num, lengths.sum, lengths.sum_squares) == (5, 11, 25)


def test_tensorboard_holds_the_numbers_of_the_metrics(run: Path) -> None:
    scalars = {
        (value.tag, step): value.simple_value
        for step, value in tensorboard_values(run)
        if value.HasField("simple_value")
    }
    assert scalars == {("objective/score", step): 0.5 * step for step in (1, 2, 3)}


def test_tensorboard_is_told_to_forget_what_lies_beyond(run: Path) -> None:
    """A session that starts at a step voids what earlier ones wrote from there on."""
    with resumed(run, 1) as folder:
        folder.write_metrics(metrics(2))
    starts = [
        event.step
        for path in sorted((run / "tensorboard").iterdir())
        for event in tensorboard_events(path)
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [0, 2]


def tensorboard_values(run: Path) -> list[tuple[int, Any]]:
    """(step, value) of each summary."""
    return [
        (event.step, value)
        for path in (run / "tensorboard").iterdir()
        for event in tensorboard_events(path)
        for value in event.summary.value
    ]


def tensorboard_events(path: Path) -> Iterator[Event]:
    """The file is of records of length, crc, bytes, crc."""
    content, place = path.read_bytes(), 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        yield Event.FromString(content[place + 12 : place + 12 + size])
        place += 12 + size + 4


def test_the_curves_are_drawn_from_what_is_on_record(run: Path, tmp_path: Path) -> None:
    found = read_records(run)
    assert [record["iteration"] for record in found.metrics] == [1, 2, 3]
    assert [record["length"] for record in found.distributions] == [[0, 4, 1]] * 3
    assert found.clip_limits == (0.8, 1.2)
    changed = replace(CONFIG, ppo=replace(CONFIG.ppo, clip_range=0.1, clip_range_high=0.3))
    with started(tmp_path / "other", changed):
        pass
    empty = read_records(tmp_path / "other")
    assert (list(empty.metrics), list(empty.distributions)) == ([], [])
    assert empty.clip_limits == (0.9, 1.3)


def fail_after_start(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), started(folder) as new:
        new.write_samples([sample(0)])
        new.plot()
        raise ZeroDivisionError


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    fail_after_start(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_leaves_what_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fail_after_start(tmp_path / "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    with pytest.raises(ZeroDivisionError), started(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "notes.txt").write_text("mine")  # meanwhile
        (tmp_path / "a" / "b" / "movie.partial").write_text("mine")
        raise ZeroDivisionError
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "movie.partial",
        "notes.txt",
    ]


def test_what_was_learnt_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), started(tmp_path / "run") as folder:
        folder.write_metrics(metrics(1))
        raise ZeroDivisionError
    assert [m["iteration"] for m in records(tmp_path / "run", "metrics.jsonl")] == [1]


@pytest.mark.parametrize("name", ["movie.partial", "metrics.jsonl.partial", "config.json.bak"])
def test_a_folder_with_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        RunFolder(tmp_path, CONFIG, resume=False)


def test_leftovers_of_a_killed_process_are_swept(run: Path) -> None:
    for name in ("config.json", "curves.png", "metrics.jsonl.bak"):
        (run / f"{name}.partial").write_text("half")
    (run / "movie.partial").write_text("mine")
    with resumed(run, 3):
        pass
    assert [path.name for path in run.rglob("*.partial")] == ["movie.partial"]


def test_one_process_at_a_time(
    run: Path, untouched: Callable[[Path], AbstractContextManager[None]]
) -> None:
    folder = RunFolder(run, CONFIG, resume=True)
    other = RunFolder(run, CONFIG, resume=True)
    in_use = pytest.raises(UsageError, match=f"{run} is in use by another process; ")
    with untouched(run):
        with folder.locked(), in_use:
            other.locked().__enter__()
        with other.locked():
            pass


def test_a_run_that_another_process_has_left_meanwhile(tmp_path: Path) -> None:
    slow, quick = (RunFolder(tmp_path / "run", CONFIG, resume=False) for _ in range(2))
    with quick.locked():
        quick.begin(-1, pytest.fail)
    with pytest.raises(UsageError, match="holds another run"):
        slow.locked().__enter__()
    assert read_config(slow.path) == CONFIG


def test_discarding_leaves_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    fail_after_start(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir() if path.is_symlink()] == ["link"]
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_start_that_was_killed_in_its_first_write_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").write_text("{")
    with started(tmp_path):
        pass
    assert read_config(tmp_path) == CONFIG
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the system, which lets root write everywhere: so the answer is made up here."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} is not writable"):
        RunFolder(tmp_path / "a" / "b", CONFIG, resume=False)


# Writing what is not the run itself never ends it.


def write_all(folder: RunFolder, iteration: int) -> None:
    folder.write_distributions(distributions(iteration))
    folder.write_metrics(metrics(iteration))
    folder.write_samples([sample(iteration)])
    folder.plot()


@pytest.mark.parametrize("room", [0, 40])
def test_a_full_disk_is_told_of_once_for_each_file(
    run: Path, room: int, no_file_beyond: Callable[[int], AbstractContextManager[None]]
) -> None:
    said: list[str] = []
    with resumed(run, 3, said) as folder:
        with no_file_beyond(room):
            for iteration in (4, 5, 6):
                write_all(folder, iteration)
        write_all(folder, 7)
    assert len(said) == 5
    for name in (*RECORDS, "tensorboard", "curves.png"):
        assert any(line.startswith(f"{run}/{name} cannot be written") for line in said)
    for name in RECORDS:
        iterations = [record["iteration"] for record in records(run, name)]
        assert iterations == [*range(name != "samples.jsonl", 8)], "they waited"
    assert (run / "curves.png").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_tensorboard_that_fails_is_left_alone(
    run: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail(self: TensorBoard, iteration: int, *_: Any) -> None:
        calls.append(iteration)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(TensorBoard, "write_scalars", fail)
    said: list[str] = []
    with resumed(run, 3, said) as folder:
        folder.write_metrics(metrics(4))
        folder.write_metrics(metrics(5))
    assert calls == [4]
    [line] = said
    assert line.startswith(f"{run}/tensorboard cannot be written: {os.strerror(number)}")
    assert [m["iteration"] for m in records(run, "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_tensorboard_folder_that_cannot_be_made(run: Path) -> None:
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("a file")
    said: list[str] = []
    with resumed(run, 3, said) as folder:
        folder.write_metrics(metrics(4))
    assert len(said) == 1
    assert (run / "tensorboard").read_text() == "a file"


def test_a_picture_that_cannot_be_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("objective/score")

    monkeypatch.setattr("ppo_jax.runs.folder.plot_curves", fail)
    said: list[str] = []
    with resumed(run, 3, said) as folder:
        folder.plot()
        folder.plot()
    assert said == [
        f"{run}/curves.png cannot be written: KeyError: 'objective/score'. The run goes on without "
        "it."
    ]


def test_records_that_are_lost_are_counted(
    run: Path, no_file_beyond: Callable[[int], AbstractContextManager[None]]
) -> None:
    said: list[str] = []
    with no_file_beyond(10**9), resumed(run, 3, said) as folder, no_file_beyond(0):
        write_all(folder, 4)
        folder.close()
    assert f"1 records could not be written to {run}/metrics.jsonl, and are lost." in said
