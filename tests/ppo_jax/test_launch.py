"""Ctrl-C while a command is still importing what it needs."""

import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5])
@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_ctrl_c_during_the_imports_ends_in_silence(command: str, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", f"ppo_jax.{command}", "--no-such-flag"],
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal, even where this process runs in the background and ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    # Or it was faster, and has said what is wrong with the flag.
    assert process.returncode in (-signal.SIGINT, 130) or "--no-such-flag" in error
