import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from ppo_jax.runs import interruption
from ppo_jax.runs.interruption import stop_on_signal

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
