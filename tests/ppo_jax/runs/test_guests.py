"""A reward shares the run's process: whatever it does there, and whatever JAX's flags are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_jax

POOLS = '''
import multiprocessing
import signal
from functools import cache

import numpy as np


def count_e(text):
    return text.count("e") / 4


@cache
def spawned():
    context = multiprocessing.get_context("spawn")
    return context.Pool(1, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


def with_pools(batch):
    """One pool that is kept, and one that is forked and ended at every call."""
    kept = spawned().map(count_e, batch.completions)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(count_e, batch.completions) == kept
    return np.array(kept, np.float32)


def without(batch):
    return np.array([count_e(text) for text in batch.completions], np.float32)
'''

FLAGS_OF_JAX = {
    "JAX_DEBUG_NANS": "1",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_TRANSFER_GUARD": "disallow",
}


def train(
    flags: list[str], reward: str, folder: Path, run: Path, environment: dict[str, str]
) -> list[dict[str, float]]:
    """The metrics of a run in a process of its own, its times left out."""
    (folder / "guests.py").write_text(POOLS)
    path = os.pathsep.join([str(Path(ppo_jax.__file__).parents[1]), str(folder)])
    arguments = [*flags, "--reward", f"guests:{reward}", "--output-dir", str(run)]
    done = subprocess.run(
        [sys.executable, "-m", "ppo_jax.train", *arguments, "--num-iterations", "2"],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))}
        for line in lines
    ]


@pytest.mark.slow
def test_pools_of_processes_and_flags_of_jax_change_nothing(
    flags: list[str], tmp_path: Path
) -> None:
    plain = train(flags, "without", tmp_path, tmp_path / "plain", {})
    assert len(plain) == 2
    assert train(flags, "with_pools", tmp_path, tmp_path / "pools", FLAGS_OF_JAX) == plain
