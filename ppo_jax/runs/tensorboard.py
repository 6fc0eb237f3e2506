"""TensorBoard's event files."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary
from tensorboardX.record_writer import masked_crc32c


class TensorBoard:
    """Writes one event file: TFRecords of `Event` messages.

    It writes at once and in the caller's thread. tensorboardX's `SummaryWriter` has a thread that
    does: where that dies of a full disk, its queue fills and the run waits for ever.

    Args:
        folder: made if it is not there; each writer has a file of its own in it.
        after: what other files hold of later iterations is void from now on.

    Raises:
        OSError: from any method; what the file holds after that is undefined.
    """

    def __init__(self, folder: Path, after: int):
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb", buffering=0)
        try:
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=after + 1, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self._file.close()
            raise

    def write_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """One number under each name."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in scalars.items()]
        self._write(Event(step=iteration, summary=Summary(value=values)))

    def write_histograms(
        self, iteration: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Under each name, the edges [bins + 1] of its bins and their heights [bins], none NaN."""
        values = [
            Summary.Value(tag=name, histo=_histogram(edges, heights))
            for name, (edges, heights) in histograms.items()
        ]
        self._write(Event(step=iteration, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = b"".join((length, _checksum(length), data, _checksum(data)))
        while record:
            record = record[self._file.write(record) :]


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))


def _histogram(edges: np.ndarray, heights: np.ndarray) -> HistogramProto:
    middles = (edges[1:] + edges[:-1]) / 2
    return HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=heights.sum(),
        sum=(heights * middles).sum(),
        sum_squares=(heights * middles**2).sum(),
        bucket_limit=edges[1:].tolist(),
        bucket=heights.tolist(),
    )
