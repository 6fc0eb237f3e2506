import signal
import time

import pytest

from ppo_jax.interruption import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    heard: list[str] = []
    with stop_on_signal(lambda: heard.append("first"), lambda: heard.append("second")) as requested:
        assert not requested()
        signal.raise_signal(number)
        assert requested()
        deadline = time.monotonic() + 5
        while not heard and time.monotonic() < deadline:
            time.sleep(0.001)
    assert heard == ["first"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_no_signal_no_wish() -> None:
    with stop_on_signal(pytest.fail, pytest.fail) as requested:
        assert not requested()


def test_an_error_in_the_block_restores_the_handlers() -> None:
    # Not what the test process has: a shell that starts it in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _raise_in_the_block()
    finally:
        signal.signal(signal.SIGINT, before)


def _raise_in_the_block() -> None:
    with pytest.raises(ZeroDivisionError), stop_on_signal(pytest.fail, pytest.fail):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
