import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto

from ppo_jax.config import preset
from ppo_jax.runs.folder import RunFolder, distributions_record, read_config, read_records
from qwen_env.errors import UsageError

CONFIG = preset("pocket")


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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with three iterations on record."""
    folder = RunFolder(tmp_path / "run", CONFIG, resume=False)
    folder.create()
    folder.open(0)
    folder.write_samples([sample(0)])
    for iteration in (1, 2, 3):
        folder.write_distributions(distributions(iteration))
        folder.write_metrics(metrics(iteration))
        folder.write_samples([sample(iteration)])
    folder.close()
    return folder.path


def test_nothing_is_written_before_create(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b", CONFIG, resume=False)
    assert list(tmp_path.iterdir()) == []
    folder.create()
    assert read_config(tmp_path / "a" / "b") == CONFIG


@pytest.mark.parametrize("iteration", [0, 1, 2, 3])
def test_opening_drops_what_lies_beyond(run: Path, iteration: int) -> None:
    folder = RunFolder(run, CONFIG, resume=True)
    folder.open(iteration, starts_anew=iteration == 0)
    folder.write_distributions(distributions(iteration + 1))
    folder.write_metrics(metrics(iteration + 1))
    folder.close()
    for name in ("metrics.jsonl", "distributions.jsonl"):
        kept = [record["iteration"] for record in records(run, name)]
        assert kept == [*range(1, iteration + 1), iteration + 1]
    # The evaluation before the first iteration is made again if the run starts again.
    kept = [s["iteration"] for s in records(run, "samples.jsonl")]
    assert kept == (list(range(iteration + 1)) if iteration else [])


def test_samples_of_the_untrained_model_stay_where_they_are_not_made_again(run: Path) -> None:
    """As after an evaluation of iteration 1 that failed."""
    folder = RunFolder(run, CONFIG, resume=True)
    folder.open(0)
    folder.close()
    assert [s["iteration"] for s in records(run, "samples.jsonl")] == [0]
    assert records(run, "metrics.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_that_was_cut_off_is_dropped(run: Path, cut: int) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    folder = RunFolder(run, CONFIG, resume=True)
    folder.open(3)
    folder.close()
    assert [m["iteration"] for m in records(run, "metrics.jsonl")] == [1, 2]


def test_a_record_of_something_else_is_named_and_kept(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(text := path.read_text() + '{"iter": 4}\n')
    with pytest.raises(UsageError, match=f"line 4 of {path} has no iteration"):
        RunFolder(run, CONFIG, resume=True).open(3)
    assert path.read_text() == text


def test_samples_that_are_gone(run: Path) -> None:
    (run / "samples.jsonl").unlink()
    assert RunFolder(run, CONFIG, resume=True).last_samples() == []


def test_whatever_a_model_writes_stays_one_record(run: Path) -> None:
    wild = "a\u2028b\x85c\x1cd\ne\r\x00\x1b[31m \ufffd"
    folder = RunFolder(run, CONFIG, resume=True)
    folder.open(3)
    folder.write_samples([sample(4, wild)])
    folder.close()
    folder.open(4)
    assert folder.last_samples() == [sample(4, wild)]
    folder.close()


def test_numbers_that_json_lacks_become_null(run: Path) -> None:
    folder = RunFolder(run, CONFIG, resume=True)
    folder.open(3)
    folder.write_metrics(metrics(4) | {"policy/loss": float("nan"), "kl": float("inf")})
    folder.close()
    text = (run / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
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
    folder = RunFolder(run, CONFIG, resume=True)
    folder.open(3)
    folder.write_distributions(before)
    folder.close()
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
    shutil.rmtree(run / "tensorboard")  # or the files of both sessions may have one name
    folder = RunFolder(run, CONFIG, resume=True)
    folder.open(1)
    folder.write_metrics(metrics(2))
    folder.close()
    [added] = (run / "tensorboard").iterdir()
    starts = [
        event.step
        for event in tensorboard_events(added)
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [2]


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
    RunFolder(tmp_path / "other", changed, resume=False).create()
    empty = read_records(tmp_path / "other")
    assert (list(empty.metrics), list(empty.distributions)) == ([], [])
    assert empty.clip_limits == (0.9, 1.3)


def test_a_blank_folder_is_one_in_which_nothing_was_learnt(run: Path, tmp_path: Path) -> None:
    assert not RunFolder(run, CONFIG, resume=True).is_blank()
    blank = RunFolder(tmp_path / "blank", CONFIG, resume=False)
    blank.create()
    blank.open(0)
    blank.write_samples([sample(0)])
    blank.close()
    assert blank.is_blank()
    blank.discard()
    assert not blank.path.exists()


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
        quick.create()
    with pytest.raises(UsageError, match="holds another run"):
        slow.locked().__enter__()
    assert read_config(slow.path) == CONFIG


def test_discarding_leaves_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    folder = RunFolder(tmp_path / "link", CONFIG, resume=False)
    with folder.locked():
        folder.create()
        folder.discard()
    assert [path.name for path in tmp_path.iterdir() if path.is_symlink()] == ["link"]
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_start_that_was_killed_in_its_first_write_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").write_text("{")
    RunFolder(tmp_path, CONFIG, resume=False).create()
    assert read_config(tmp_path) == CONFIG


def test_another_field_is_named(run: Path) -> None:
    changed = replace(CONFIG, ppo=replace(CONFIG.ppo, clip_range=0.3))
    with pytest.raises(UsageError, match=r"clip_range = 0\.2, not 0\.3"):
        RunFolder(run, changed, resume=True)


def test_what_may_change_may(run: Path) -> None:
    changed = replace(CONFIG, run=replace(CONFIG.run, num_iterations=7, eval_every=3))
    folder = RunFolder(run, changed, resume=True)
    folder.create()
    assert read_config(run) == changed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not the config"),
        ("[]", "not the config"),
        ("{}", "no field 'task'"),
        ('{"task": {"modle": "x"}, "ppo": {}, "optimizer": {}, "run": {}}', "modle"),
        ('{"task": {}, "ppo": {"gamma": 3}, "optimizer": {}, "run": {}}', "gamma is 3"),
    ],
)
def test_a_config_that_cannot_be_read(run: Path, content: str, words: str) -> None:
    (run / "config.json").write_text(content)
    with pytest.raises(UsageError, match=words):
        read_config(run)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the system, which lets root write everywhere: so the answer is made up here."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} is not writable"):
        RunFolder(tmp_path / "a" / "b", CONFIG, resume=False)
