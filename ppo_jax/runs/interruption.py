"""Ctrl-C that ends a run after its iteration, and is heard at once.

Python runs signal handlers between two of its own instructions, and an iteration of a large model
is one compiled call of many seconds. So the signals are also written to a socket, by the
interpreter's C handler, where a thread of ours reads them.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_STATUS = 130  # 128 + SIGINT, as shells have it

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_ONE_SIGNAL = 1.0  # seconds: `timeout` and others signal a process and its group


@contextmanager
def stop_on_signal(
    on_first: Callable[[], None], on_second: Callable[[], None]
) -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT, SIGTERM and SIGHUP no longer interrupt. Main thread only.

    Yields a function that tells whether one has come. The first calls `on_first`; the second calls
    `on_second` and ends the process, unless it comes within a second.
    """
    requested = threading.Event()
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
                os._exit(EXIT_STATUS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    handlers = {
        number: signal.signal(number, lambda *_: requested.set())
        for number in _SIGNALS
        # Under nohup the end of the terminal is to be ignored.
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    }
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield requested.is_set
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()
