import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from ppo_jax.runs import interruption
from ppo_jax.runs.interruption import stop_on_signal

# JAX says so wherever it is loaded; these children do not touch it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Not what the test process has: shells and nohup start it with signals ignored."""
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_wish(number: signal.Signals) -> None:
    heard: list[str] = []
    with stop_on_signal(lambda: heard.append("first"), lambda: heard.append("second")) as requested:
        assert not requested()
        signal.raise_signal(number)
        assert requested()
        wait_for(lambda: heard)
    assert heard == ["first"]
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 3


def test_the_second_ends_the_process_if_it_is_not_the_first_delivered_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[int] = []
    heard: list[str] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with stop_on_signal(lambda: heard.append("first"), lambda: heard.append("second")):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: heard)
        time.sleep(0.05)
        assert (heard, ends) == (["first"], [])
        monkeypatch.setattr(interruption, "_ONE_SIGNAL", 0.0)
        signal.raise_signal(signal.SIGINT)
        wait_for(lambda: ends)
    assert (heard, ends) == (["first", "second"], [130])


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signal(pytest.fail, pytest.fail) as requested:
        signal.raise_signal(signal.SIGHUP)
        assert not requested()


def test_no_signal_no_wish() -> None:
    with stop_on_signal(pytest.fail, pytest.fail) as requested:
        assert not requested()


def test_an_error_in_the_block_restores_the_handlers() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(ZeroDivisionError), stop_on_signal(pytest.fail, pytest.fail):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_forked_child_is_not_the_run() -> None:
    """A pool ends its workers with SIGTERM, some before they have run a line of Python."""
    with stop_on_signal(pytest.fail, pytest.fail) as requested:
        for delay in (0.0, 0.0, 0.0, 0.05):
            if not (child := os.fork()):
                time.sleep(10)
                os._exit(0)
            time.sleep(delay)
            os.kill(child, signal.SIGINT)
            os.kill(child, signal.SIGHUP)
            time.sleep(delay)
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "Ctrl-C is the run's to hear"
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.05)
        assert not requested()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint(SIGNALS)


def test_the_second_ends_pools_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_ONE_SIGNAL", 0.0)
    monkeypatch.setattr(os, "_exit", (ends := []).append)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(10,))
    with stop_on_signal(lambda: None, lambda: None):
        child.start()
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
        wait_for(lambda: ends)
        child.join()
    assert (ends, child.exitcode) == ([130], -signal.SIGKILL)


def test_what_a_guest_takes_is_taken_back() -> None:
    heard: list[str] = []
    with stop_on_signal(lambda: heard.append("first"), pytest.fail) as requested:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        assert not requested()  # as after each iteration
        signal.raise_signal(signal.SIGHUP)
        assert requested()
        wait_for(lambda: heard)
    assert heard == ["first"]
