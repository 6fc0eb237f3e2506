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
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), stop_on_signal(pytest.fail, pytest.fail):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
