"""Files of records: JSON objects, one a line, each of an iteration, in order.

What is on record stays as it is. Only two things go when a run is resumed: a last line that was not
finished, and the records of iterations that will be done again. The file as it was is then kept
beside it, under its name with `.bak`.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.files import atomic, disk_errors
from qwen_env.errors import UsageError

Record = dict[str, Any]

BACKUP = ".bak"

# Those that JSON allows within a string, and at which `str.splitlines` and editors break lines.
_LINE_ENDS = {ord(x): f"\\u{ord(x):04x}" for x in "\x85\u2028\u2029"}


class RecordFile:
    """One file of records: read as a whole, or opened and appended to."""

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None
        self._torn_at: int | None = None  # where a write began that failed
        self._waiting: list[bytes] = []  # lines that could not be written yet

    def read(self) -> list[Record]:
        """All records; none where there is no file.

        Raises:
            UsageError: a line is damaged, and is not just the last one, unfinished.
        """
        return [line.record for line in self._lines()]

    def open(self, last: int) -> list[int]:
        """Begin to append after iteration `last`; what lies beyond is cut off.

        Returns the iterations of the records that stay.

        Raises:
            UsageError: as in `read`; the file is left as it is.
            RunError: the file cannot be written.
        """
        kept: list[int] = []
        end, has_newline = 0, True
        for line in self._lines():
            if line.record["iteration"] <= last:
                kept.append(line.record["iteration"])
                end, has_newline = line.end, line.has_newline
        with disk_errors(self.path):
            if self.path.exists() and self.path.stat().st_size > end:
                with atomic(self.path.with_name(self.path.name + BACKUP)) as backup:
                    shutil.copyfile(self.path, backup)
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(end)
            if not has_newline:
                self._write(b"\n")
        return kept

    def append(self, records: Sequence[Record]) -> None:
        """Write records, behind those that could not be written before.

        Raises:
            RunError: they cannot be written; they wait for the next call.
        """
        self._waiting += [_as_line(record) for record in records]
        with disk_errors(self.path):
            self._write(b"".join(self._waiting))
        self._waiting.clear()

    def sync(self) -> None:
        """Wait until every record is on the disk. Errors as in `append`."""
        if self._file is not None:
            self.append([])
            with disk_errors(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> int:
        """Returns how many records could not be written."""
        if self._file is not None:
            self._file.close()
        return len(self._waiting)

    def _write(self, content: bytes) -> None:
        """Write all of it; where that fails, the next call begins in the same place."""
        assert self._file is not None
        if self._torn_at is not None:
            self._file.truncate(self._torn_at)
        self._torn_at = os.fstat(self._file.fileno()).st_size
        while content:
            content = content[self._file.write(content) :]
        self._torn_at = None

    def _lines(self) -> Iterator["_Line"]:
        if not self.path.exists():
            return
        if not self.path.is_file():
            raise UsageError(f"{self.path} is not a file; move it away, and try again.")
        end, iteration = 0, 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                end += len(line)
                has_newline = line.endswith(b"\n")
                try:
                    record = _parse(line, iteration)
                except ValueError as error:
                    if not has_newline:  # a crash came in between
                        return
                    raise UsageError(
                        f"line {number} of {self.path} {error}; mend that line or remove it, and "
                        "try again."
                    ) from error
                iteration = record["iteration"]
                yield _Line(record, end, has_newline)


class _Line(NamedTuple):
    record: Record
    end: int  # in the file
    has_newline: bool


def _parse(line: bytes, previous: int) -> Record:
    """The record of a line, whose iteration is at least `previous`.

    Raises:
        ValueError: it is damaged; the message goes on where "line 3 of metrics.jsonl" ends.
    """
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        raise ValueError("has no iteration")
    if (iteration := record["iteration"]) < previous:
        raise ValueError(f"is of iteration {iteration}, but stands behind iteration {previous}")
    return record


def _as_line(record: Mapping[str, Any]) -> bytes:
    """JSON has no NaN and no infinity: they become null. No reader sees the end of a line in it."""
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
    return text.translate(_LINE_ENDS).encode(errors="backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
