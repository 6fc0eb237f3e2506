"""Ctrl-C that ends a run after its iteration, and is heard at once.

Python runs signal handlers between two of its own instructions, and an iteration of a large model
is one compiled call of many seconds. So the signals are also written to a socket, by the
interpreter's C handler, where a thread of ours reads them.

A child that is forked meanwhile, as by a pool of processes in a reward function, inherits handlers
and socket. It gives back what is not its own: a pool ends its workers with SIGTERM. Ctrl-C and the
end of the terminal, which reach the whole group of processes, it leaves to the run.
"""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_STATUS = 130  # 128 + SIGINT, as shells have it

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_ONE_SIGNAL = 1.0  # seconds: `timeout` and others signal a process and its group
_before: dict[int, Any] = {}  # handlers that the open block has replaced
_mask = threading.local()


@contextmanager
def stop_on_signal(
    on_first: Callable[[], None], on_second: Callable[[], None]
) -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT, SIGTERM and SIGHUP no longer interrupt. Main thread only.

    Yields a function that tells whether one has come. The first calls `on_first`; the second calls
    `on_second` and ends the process and its pools, unless it comes within a second.
    """
    requested = False
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        first: float | None = None
        while number := reader.recv(1):
            if number[0] not in _SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                on_first()
            elif time.monotonic() - first > _ONE_SIGNAL:
                on_second()
                _leave()

    def request(*_: object) -> None:
        nonlocal requested  # no lock, such as an Event has: one signal may interrupt another
        requested = True

    def hold() -> None:
        """Take what a reward function, or a library of its, has taken for itself."""
        for number in _before:
            signal.signal(number, request)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def is_requested() -> bool:
        hold()
        return requested

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    # Under nohup the end of the terminal is to be ignored.
    numbers = [n for n in _SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    _before.update({n: signal.getsignal(n) or signal.SIG_DFL for n in numbers})
    wakeup = signal.set_wakeup_fd(-1)
    hold()
    try:
        yield is_requested
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in _before.items():
            signal.signal(number, handler)
        _before.clear()
        writer.close()
        thread.join()
        reader.close()


def _leave() -> None:
    try:
        for child in multiprocessing.active_children():
            child.kill()  # it would wait for work for ever
    finally:
        os._exit(EXIT_STATUS)


# While a process forks, signals wait: a child's SIGTERM may come before its first line of Python.


def _before_fork() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _before)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    if _before:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, _before.get(signal.SIGTERM, signal.SIG_IGN))
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
