"""A sign of life from rewards that take time."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

QUIET_SECONDS = 2.0


def with_progress(batches: Sequence[T], what: str) -> Iterator[T]:
    """Go through `batches`; on a terminal, after a while, say on stderr how far it is."""
    start = time.monotonic()
    has_spoken = False
    for done, batch in enumerate(batches):
        if sys.stderr.isatty() and time.monotonic() - start > QUIET_SECONDS:
            has_spoken = True
            print(f"\r{what}: {done}/{len(batches)} batches", end="", file=sys.stderr, flush=True)
        yield batch
    if has_spoken:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
