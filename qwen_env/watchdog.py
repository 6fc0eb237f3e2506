"""An end for other people's code that has none: limits of time and memory for a block.

A second thread raises in the one that goes too far. That works in all threads and leaves signals
alone, so that Ctrl-C ends the block as usual. Python raises between two of its own operations: one
that is endless by itself (a power with 10^9 digits) is left to Ctrl-C.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10.0
"""How long a block may take."""
BYTES = 2**30
"""How much the process may grow meanwhile; somewhat more than this before it is noticed."""

_POLL_SECONDS = 0.02


class TooMuch(BaseException):
    """A block went too far. No `except Exception` inside the block swallows it."""


class TooLong(TooMuch):
    """It took too long."""

    def __str__(self) -> str:
        return f"it took more than {SECONDS:g} seconds"


class TooLarge(TooMuch):
    """It took too much memory."""

    def __str__(self) -> str:
        return f"it took more than {BYTES / 2**30:g} GiB of memory"


@contextmanager
def watched() -> Iterator[None]:
    """Raise `TooMuch` inside the block if it takes too long or too much memory."""
    block = _Block()
    _watchdog.take(block)
    try:
        yield
    finally:
        block.end()
        _watchdog.blocks.discard(block)


class _Block:
    """A block that runs in the thread that made this."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.start, self.memory = time.monotonic(), _peak_memory()
        self.verdict = threading.Lock()
        self.has_ended = self.was_stopped = False

    def stop_if_too_much(self) -> None:
        if time.monotonic() - self.start > SECONDS:
            self._stop(TooLong)
        elif _peak_memory() - self.memory > BYTES:
            self._stop(TooLarge)

    def end(self) -> None:
        with self.verdict:
            self.has_ended = True
            if self.was_stopped:  # if only just now, nothing must be raised after the block
                _raise_in(self.thread, None)

    def _stop(self, error: type[TooMuch]) -> None:
        with self.verdict:
            if not self.has_ended and not self.was_stopped:
                self.was_stopped = True
                _raise_in(self.thread, error)


class _Watchdog:
    """A thread that looks after the blocks under way, and sleeps while there are none."""

    def __init__(self) -> None:
        self.blocks: set[_Block] = set()
        self._has_work = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, block: _Block) -> None:
        self.blocks.add(block)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        if not self._has_work.is_set():
            self._has_work.set()

    def _watch(self) -> None:
        while self._has_work.wait():
            time.sleep(_POLL_SECONDS)
            for block in tuple(self.blocks):
                block.stop_if_too_much()
            if not self.blocks:
                self._has_work.clear()
                if self.blocks:  # one came in between
                    self._has_work.set()


_watchdog = _Watchdog()


def _renew() -> None:
    """A forked child has none of its parent's threads."""
    global _watchdog
    _watchdog = _Watchdog()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    target = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), target)


def _peak_memory() -> int:
    """The most memory that the process has had, in bytes; 0 where that cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
