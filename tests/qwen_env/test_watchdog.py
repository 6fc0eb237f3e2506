import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from qwen_env import watchdog
from qwen_env.watchdog import TooLarge, TooLong, TooMuch, watched


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(watchdog, "SECONDS", 0.2)


def loop_for_ever():
    while True:
        pass


def test_a_block_that_takes_too_long(impatient):
    with pytest.raises(TooLong, match=r"took more than 0.2 seconds"), watched():
        try:
            loop_for_ever()
        except Exception as error:  # as jinja2 does to make the error nicer
            raise AssertionError from error


def test_blocks_in_several_threads(impatient):
    ends = []

    def run(block):
        try:
            with watched():
                ends.append(block())
        except TooMuch as error:
            ends.append(type(error))

    blocks = [loop_for_ever, lambda: "done", loop_for_ever]
    threads = [threading.Thread(target=run, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["done", TooLong, TooLong]


def test_a_block_that_takes_too_much_memory(monkeypatch):
    monkeypatch.setattr(watchdog, "BYTES", 2**24)
    peak = watchdog._peak_memory()
    with pytest.raises(TooLarge, match="GiB of memory"), watched():
        grown = []
        while True:
            grown.append(bytearray(b"x" * 2**20))
    assert watchdog._peak_memory() - peak < 2**30


def test_nothing_is_raised_after_the_block(monkeypatch):
    """Many blocks that end just as they are found to take too long."""
    monkeypatch.setattr(watchdog, "SECONDS", 0.004)
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.001)
    for _ in range(200):
        with contextlib.suppress(TooLong), watched():
            time.sleep(0.004)
        for _ in range(1000):
            len("whatever")


def test_ctrl_c_ends_a_block():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt), watched():
            loop_for_ever()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_forked_child_has_a_watchdog_too():
    code = """
        import os
        from qwen_env import watchdog
        watchdog.SECONDS = 0.2
        with watchdog.watched():
            pass
        child = os.fork()
        try:
            with watchdog.watched():
                while child == 0:
                    pass
        except watchdog.TooLong:
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    code = textwrap.dedent(code)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "7\n", run.stderr
