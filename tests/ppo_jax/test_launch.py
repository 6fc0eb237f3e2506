"""Ctrl-C while a command is still importing what it needs."""

import signal
import subprocess
import sys
import time

import pytest

# As `python -m`, from a terminal (in the background Ctrl-C would be ignored), and telling when
# Ctrl-C is left to the system.
START = """
import runpy, signal, sys

def told(number, handler, set_handler=signal.signal):
    before = set_handler(number, handler)
    if handler is signal.SIG_DFL:
        print("begin", flush=True)
    return before

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal = told
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "sft"])
def test_ctrl_c_during_the_imports_ends_in_silence(command: str, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", START, f"ppo_jax.{command}", "--no-such-flag"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begin\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    # Or it was faster, and has said what is wrong with the flag.
    assert process.returncode in (-signal.SIGINT, 130) or "--no-such-flag" in error
