"""An interrupted run that is resumed is the run that was never interrupted, bit for bit (CPU)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

import ppo_jax
from ppo_jax.runs import checkpoints
from ppo_jax.runs.folder import RunFolder
from ppo_jax.train import main


class Killed(BaseException):
    """Stands for kill -9: nothing in the package catches or cleans up after it."""


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


def state(run: Path, iteration: int) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(run / "checkpoints" / str(iteration) / "arrays")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    is_timed = ("time/", "throughput/")
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(is_timed)}
        for line in lines
    ]


def assert_same_run(run: Path, other: Path, last: int = 6) -> None:
    assert metrics(run) == metrics(other)
    models = (f"{model}/{file}" for model in ("best", "final") for file in MODEL_FILES)
    for name in ("samples.jsonl", "distributions.jsonl", "tokens.jsonl", *models):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert_same_state(run, other, last)


def assert_same_state(run: Path, other: Path, iteration: int) -> None:
    ours, theirs = state(run, iteration), state(other, iteration)
    assert len(ours) > 30, "parameters and both moments of each"
    for name in ("kl_coef", "score_moments", "reference", "root_key"):
        assert any(name in array for array in ours), name
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


MODEL_FILES = (
    "model.safetensors",
    "critic/value_head.safetensors",
    "config.json",
    "tokenizer.json",
)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer to draw than the rest of such a small run."""
    monkeypatch.setattr(RunFolder, "plot", lambda self: self.path / "curves.png")


@pytest.mark.parametrize(
    ("call", "number", "saved_after"),
    [
        pytest.param(1, signal.SIGINT, 1, id="evaluation of the untrained model"),
        pytest.param(10, signal.SIGTERM, 4, id="evaluation after the fourth iteration"),
        pytest.param(12, signal.SIGINT, 6, id="last iteration"),
    ],
)
def test_a_signal_ends_the_run_behind_its_iteration(
    call: int,
    number: signal.Signals,
    saved_after: int,
    finished_run: Path,
    flags: list[str],
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupt(batch: Any) -> Any:
        signal.raise_signal(number)
        return rewards.count_e(batch)

    rewards.on_call[call] = interrupt
    run = tmp_path / "run"
    if saved_after == 6:  # nothing is left to do: the run ends as it would have
        main([*flags, "--output-dir", str(run)])
    else:
        with pytest.raises(SystemExit) as exit:
            main([*flags, "--output-dir", str(run)])
        assert exit.value.code == 130
        assert len(metrics(run)) == saved_after
        said = capfd.readouterr().err
        assert f"saved as it was after iteration {saved_after}, in {run}/checkpoints" in said
        assert f"continue it with: ppo-train --output-dir {run} --resume" in said
        main(["--output-dir", str(run), "--resume"])
    assert_same_run(run, finished_run)


@pytest.mark.slow
def test_what_is_frozen_is_in_no_checkpoint(
    flags: list[str], rewards: ModuleType, tmp_path: Path
) -> None:
    """It is the model's, which is loaded again."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    short = [*flags, "--freeze-embeddings", "--num-frozen-layers", "1", "--num-iterations", "3"]
    main([*short, "--output-dir", str(whole)])
    rewards.calls, rewards.on_call = 0, {4: raises(RuntimeError("no connection"))}
    with pytest.raises(SystemExit):
        main([*short, "--output-dir", str(again)])
    main(["--output-dir", str(again), "--resume"])
    assert metrics(again) == metrics(whole)
    for name in ("tokens.jsonl", *(f"final/{file}" for file in MODEL_FILES)):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = state(again, 3), state(whole, 3)
    assert ours.keys() == theirs.keys()
    assert not any("embed_tokens" in name or "lower_layers" in name for name in ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.slow
def test_on_other_numbers_of_devices(flags: list[str], rewards: ModuleType, tmp_path: Path) -> None:
    """On two, bit for bit; begun on two and resumed on one, and then on four, but for rounding."""
    two, again, others = tmp_path / "two", tmp_path / "again", tmp_path / "others"
    short = [*flags, "--num-devices", "2", "--num-minibatches", "1", "--num-iterations", "3"]
    main([*short, "--output-dir", str(two)])

    def interrupted_in(call: int, arguments: list[str]) -> None:
        rewards.calls = 0
        rewards.on_call = {call: raises(RuntimeError("no connection"))}
        with pytest.raises(SystemExit):
            main(arguments)

    interrupted_in(4, [*short, "--output-dir", str(again)])
    main(["--output-dir", str(again), "--resume"])
    assert_same_run(two, again, last=3)

    interrupted_in(4, [*short, "--output-dir", str(others)])
    interrupted_in(4, ["--output-dir", str(others), "--resume", "--num-devices", "1"])
    main(["--output-dir", str(others), "--resume", "--num-devices", "4"])
    assert_same_but_for_rounding(two, others, last=3)


def assert_same_but_for_rounding(run: Path, other: Path, last: int) -> None:
    """The same tokens, and much the same parameters: Adam magnifies what is rounded to near 0."""
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)
    ours, theirs = state(run, last), state(other, last)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_parameters_in_bfloat16(flags: list[str], rewards: ModuleType, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    short = [*flags, "--param-dtype", "bfloat16", "--num-iterations", "2"]
    main([*short, "--output-dir", str(one)])
    types: dict[str, set[str]] = {"params": set(), ".mu": set(), ".nu": set(), ".reference": set()}
    for name, array in state(one, 2).items():
        for kind in types:
            if kind in name and "value_head" not in name:
                types[kind].add(str(array.dtype))
    float32, bfloat16 = {"float32"}, {"bfloat16"}
    assert types == {"params": bfloat16, ".mu": bfloat16, ".nu": float32, ".reference": float32}
    rewards.calls = 0
    rewards.on_call[4] = raises(RuntimeError("no connection"))
    with pytest.raises(SystemExit):
        main([*short, "--output-dir", str(other)])
    main(["--output-dir", str(other), "--resume"])
    assert_same_run(one, other, last=2)


@pytest.mark.parametrize(
    ("call", "saved_after"),
    [
        pytest.param(5, 2, id="evaluation of an iteration whose update is done"),
        pytest.param(12, 5, id="last iteration"),
    ],
)
def test_a_reward_that_fails_in_the_middle_can_be_mended(
    call: int,
    saved_after: int,
    finished_run: Path,
    flags: list[str],
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rewards.on_call[call] = raises(RuntimeError("no connection"))
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as exit:
        main([*flags, "--output-dir", str(run)])
    assert exit.value.code == 2
    said = capfd.readouterr().err
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    for words in (
        "The reward function rewards_of_tests.scripted raised RuntimeError: no connection",
        f"saved as it was after iteration {saved_after}, in {run}/checkpoints",
        f"--output-dir {run} --resume",
    ):
        assert words in error
    assert "Traceback" not in said
    # The record of an iteration whose evaluation fails waits in the checkpoint.
    done = saved_after - (call == 5)
    for name in ("metrics.jsonl", "distributions.jsonl"):
        lines = (run / name).read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [*range(1, done + 1)]
    main(["--output-dir", str(run), "--resume"])
    assert_same_run(run, finished_run)


@pytest.mark.slow
def test_iterations_can_be_added(flags: list[str], rewards: ModuleType, tmp_path: Path) -> None:
    """Under a constant schedule: one program, however many iterations there are."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    constant = [*flags, "--schedule", "constant", "--num-iterations"]
    main([*constant, "1", "--output-dir", str(run)])
    main(["--output-dir", str(run), "--resume", "--num-iterations", "3"])
    assert [m["iteration"] for m in metrics(run)] == [1, 2, 3]
    assert json.loads((run / "config.json").read_text())["run"]["num_iterations"] == 3
    rewards.calls = 0
    main([*constant, "3", "--output-dir", str(whole)])
    assert_same_state(run, whole, 3)


def test_resuming_a_finished_run_changes_nothing(
    finished_run: Path, rewards: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    main(["--output-dir", str(run), "--resume"])
    assert "All 6 iterations were done already" in capfd.readouterr().err
    assert_same_run(run, finished_run)


def test_a_disk_that_is_full(
    finished_run: Path,
    flags: list[str],
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"

    def fill(batch: Any) -> Any:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        return rewards.count_e(batch)

    rewards.on_call[11] = fill  # in iteration 5
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        main([*flags, "--output-dir", str(run)])
    assert exit.value.code == 2
    said = capfd.readouterr().err
    assert f"{run}/checkpoints/6 cannot be written: No space left on device" in said
    assert f"saved as it was after iteration 3, in {run}/checkpoints" in said
    assert "Traceback" not in said
    main(["--output-dir", str(run), "--resume"])
    assert_same_run(run, finished_run)


def test_what_was_learnt_is_saved_before_a_bug_shows_its_traceback(
    finished_run: Path,
    flags: list[str],
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"

    def arm(batch: Any) -> Any:
        patch.setattr(RunFolder, "write_metrics", raises(ZeroDivisionError()))
        return rewards.count_e(batch)

    rewards.on_call[8] = arm  # in iteration 4
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        main([*flags, "--output-dir", str(run)])
    assert f"after iteration 4, in {run}/checkpoints" in capfd.readouterr().err
    main(["--output-dir", str(run), "--resume"])
    assert_same_run(run, finished_run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--num-iterations", "5"], "num_iterations is 5, but the run in {run} has done 6"),
        ([], "{run} holds a finished run whose checkpoints are gone; its model is in {run}/final"),
    ],
)
def test_a_finished_run_is_not_started_again(
    changes: list[str],
    words: str,
    finished_run: Path,
    rewards: ModuleType,
    untouched: Callable[[Path], AbstractContextManager[None]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    if not changes:
        shutil.rmtree(run / "checkpoints")
    with untouched(run), pytest.raises(SystemExit) as exit:
        main(["--output-dir", str(run), "--resume", *changes])
    assert exit.value.code == 2
    assert words.format(run=run) in capfd.readouterr().err


KILLED_IN = (
    (RunFolder, "write_samples"),
    (RunFolder, "write_metrics"),
    (RunFolder, "write_distributions"),
    (ocp.Checkpointer, "save"),
    (checkpoints, "_seal"),
    (Path, "rename"),
    (checkpoints.Checkpoints, "iterations"),  # the checkpoint is there, older ones must go
)


@pytest.mark.slow
def test_killed_at_every_step_of_writing(
    finished_run: Path, flags: list[str], rewards: ModuleType, tmp_path: Path
) -> None:
    """One run, killed again and again: each time in the iteration after the resumed one's."""
    run = tmp_path / "run"
    arguments = [*flags, "--save-every", "1", "--keep-checkpoints", "3", "--output-dir", str(run)]
    for owner, name in KILLED_IN:

        def arm(batch: Any, owner: Any = owner, name: str = name) -> Any:
            patch.setattr(owner, name, raises(Killed()))
            return rewards.count_e(batch)

        # Behind the evaluation of the untrained model, where there is one.
        rewards.calls = 0
        has_checkpoint = (run / "checkpoints").exists() and any((run / "checkpoints").iterdir())
        rewards.on_call = {1 if has_checkpoint else 4: arm}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            main(arguments)
        arguments = ["--output-dir", str(run), "--resume"]
    rewards.on_call = {}
    main(arguments)
    assert_same_run(run, finished_run)
    assert not list(run.rglob("*.partial"))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "5", "6"]


def start(arguments: list[str], inputs: Path, seconds_a_reward: float) -> subprocess.Popen[str]:
    paths = [str(Path(ppo_jax.__file__).parents[1]), str(inputs)]
    return subprocess.Popen(
        [sys.executable, "-m", "ppo_jax.train", *arguments],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "SECONDS_A_REWARD": str(seconds_a_reward),
            "PYTHONUNBUFFERED": "1",
            # The programs of the finished run serve, if there are as many devices as here; nothing
            # is added to them by a process that may be killed while it writes.
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "inf",
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_iteration(run: Path, iteration: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and f'"iteration": {iteration},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended early: {process.communicate()}")


@pytest.mark.slow
def test_kill_9_and_ctrl_c_once_and_twice(
    finished_run: Path, flags: list[str], inputs: Path, rewards: ModuleType, tmp_path: Path
) -> None:
    """One run: killed at a random moment, stopped, left without saving, finished."""
    run = tmp_path / "run"
    seed = int(os.environ.get("SEED_OF_MOMENTS", 0))
    moment = np.random.default_rng(seed).uniform(0, 0.7)
    print(f"killed {moment} seconds behind the first iteration (SEED_OF_MOMENTS={seed})")
    process = start([*flags, "--save-every", "1", "--output-dir", str(run)], inputs, 0.3)
    wait_for_iteration(run, 1, process)
    time.sleep(moment)
    process.kill()
    process.communicate()

    again = ["--output-dir", str(run), "--resume"]
    done = (run / "metrics.jsonl").read_text().count("\n")  # the last line may be cut off
    process = start(again, inputs, 0.3)
    wait_for_iteration(run, done + 1, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopping after this iteration" in said
    assert f"continue it with: ppo-train --output-dir {run} --resume" in said
    assert "Traceback" not in said
    assert "\x1b" not in said, "piped output holds no escape codes"

    done = len(metrics(run))
    process = start(again, inputs, 100.0)
    assert process.stderr is not None
    assert f"Continuing after iteration {done}" in process.stderr.readline()
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    assert "Stopping after this iteration" in process.stderr.readline()
    time.sleep(1.1)  # before that it is the first one, delivered twice
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert said == "Left without saving.\n"

    main(again)
    assert_same_run(run, finished_run)
