"""Files of records: nothing that is on record is lost or changed in silence."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.runs.records import Record, RecordFile
from qwen_env.errors import RunError, UsageError


def record(iteration: int) -> Record:
    return {"iteration": iteration, "score": 0.1 * iteration, "text": "ein Füßchen\n"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three iterations."""
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(path)
    file.open(-1)
    for iteration in (1, 2, 3):
        file.append([record(iteration)])
    file.close()
    return path


def test_what_is_appended_is_read(path: Path) -> None:
    assert RecordFile(path).read() == [record(1), record(2), record(3)]
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [record(1), record(2), record(3)]
    assert lines[-1] == ""


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert RecordFile(tmp_path / "metrics.jsonl").read() == []


def reopen(path: Path, last: int) -> list[int]:
    file = RecordFile(path)
    kept = file.open(last)
    file.append([record(last + 1)])
    file.close()
    return kept


def test_an_unfinished_last_line_goes_wherever_it_is_cut(path: Path) -> None:
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(ends[1], len(whole) + 1):
        path.write_bytes(whole[:cut])
        # Without its line end alone it is whole.
        kept = [1, 2, 3] if cut >= len(whole) - 1 else [1, 2]
        assert reopen(path, 3) == kept
        assert RecordFile(path).read() == [record(i) for i in (*kept, 4)]
    assert path.with_name("metrics.jsonl.bak").read_bytes() == whole[:-2]


NOT_JSON = "is not valid JSON"
DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda line: line.replace(b":", b" ", 1), NOT_JSON),
    (lambda line: line.replace(b"\xc3", b"\xff", 1), NOT_JSON),  # in a text, no longer UTF-8
    (lambda line: line[: len(line) // 2], NOT_JSON),
    (lambda line: b"", NOT_JSON),
    (lambda line: b"\0" * len(line), NOT_JSON),
    (lambda line: b"[" * 100_000, NOT_JSON),
    (lambda line: b"7", "has no iteration"),
    (lambda line: b'{"iter": 2}', "has no iteration"),
    (lambda line: b'{"iteration": true}', "has no iteration"),
    (lambda line: b'{"iteration": "2"}', "has no iteration"),
    (lambda line: line.replace(b": 2", b": 0", 1), "is of iteration 0, but stands behind"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
@pytest.mark.parametrize("last", [0, 1, 3])
def test_damage_anywhere_else_is_named_and_nothing_is_touched(
    path: Path, damage: Callable[[bytes], bytes], words: str, last: int
) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage(lines[1])
    path.write_bytes(damaged := b"\n".join(lines))
    for read in (RecordFile(path).read, lambda: RecordFile(path).open(last)):
        with pytest.raises(
            UsageError, match=f"^line 2 of {path} {words}.*mend that line or remove"
        ):
            read()
    assert path.read_bytes() == damaged
    assert list(path.parent.iterdir()) == [path]


def test_the_last_line_is_damaged_though_it_is_finished(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"iteration": 4, "sco\n')
    with pytest.raises(UsageError, match="line 4 of"):
        RecordFile(path).read()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_something_that_is_no_file(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """A pipe would be waited for."""
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match="is not a file"):
        RecordFile(tmp_path / "metrics.jsonl").read()


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_what_finds_no_room_waits(
    path: Path, room: int, no_file_beyond: Callable[[int], AbstractContextManager[None]]
) -> None:
    """Half a line may be written, which must not be the beginning of the next."""
    file = RecordFile(path)
    file.open(3)
    with no_file_beyond(path.stat().st_size + room):
        for iteration in (4, 5):
            with pytest.raises(RunError, match=rf"{path} cannot be written: File too large"):
                file.append([record(iteration)])
    assert RecordFile(path).read() == [record(i) for i in range(1, 4)]
    file.append([record(6)])
    assert RecordFile(path).read() == [record(i) for i in range(1, 7)]
    assert file.close() == 0


def test_what_never_found_room_is_counted(
    path: Path, no_file_beyond: Callable[[int], AbstractContextManager[None]]
) -> None:
    file = RecordFile(path)
    file.open(3)
    with no_file_beyond(0), pytest.raises(RunError):
        file.append([record(4), record(5)])
    assert file.close() == 2
