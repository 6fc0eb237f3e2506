import errno
import os
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from gymnasium.error import DependencyNotInstalled

from ppo_jax import cli
from ppo_jax.train import parse_arguments
from qwen_env.errors import UsageError


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UsageError("one\n  thing is wrong."), "error: one thing is wrong.\n"),
        (DependencyNotInstalled("run: pip install x"), "error: run: pip install x\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"),
            "error: runs/x/metrics.jsonl: No space left on device.\n",
        ),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 5368709120 bytes.\nmore"
            ),
            "error: Out of memory (5.0 GiB wanted): lower batch_size or max_new_tokens, raise "
            "num_microbatches, or set --remat.\n",
        ),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.34GiB."
            ),
            "error: Out of memory (12.34 GiB wanted): lower batch_size or max_new_tokens, raise "
            "num_microbatches, or set --remat.\n",
        ),
        (
            UnicodeEncodeError("ascii", "a日", 1, 2, "ordinal not in range"),
            "error: The output's encoding (ascii) lacks '\\u65e5'; set PYTHONIOENCODING=utf-8.\n",
        ),
    ],
)
def test_errors_that_the_user_can_fix(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit, cli.errors_as_sentences():
        raise error
    assert exit.value.code == 2
    assert capsys.readouterr().err == sentence


def test_ctrl_c_outside_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit, cli.errors_as_sentences():
        raise KeyboardInterrupt
    assert exit.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), OSError("odd"), jax.errors.JaxRuntimeError("INTERNAL: odd")]
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), cli.errors_as_sentences():
        raise error


def test_a_reader_that_has_seen_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, pytest.raises(SystemExit) as exit:
        monkeypatch.setattr(sys, "stdout", stream)
        with cli.errors_as_sentences():
            print("a completion")
    assert exit.value.code == 141


def test_output_to_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as stream, pytest.raises(SystemExit) as exit:
        monkeypatch.setattr(sys, "stdout", stream)
        with cli.errors_as_sentences():
            print("a table")
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "error: The output cannot be written: No space left on device.\n"
    )


@pytest.mark.parametrize(
    ("raised", "why"), [(AssertionError(), "it is not installed"), (RuntimeError("odd"), "odd")]
)
def test_a_platform_that_is_not_there(
    raised: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices() -> None:
        raise raised

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UsageError, match=f"JAX cannot use JAX_PLATFORMS=cuda: {why}; unset"):
        cli.find_devices()


def test_a_device_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> None:
        raise RuntimeError("no driver")

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UsageError, match=r"^JAX cannot start: no driver; .* set JAX_PLATFORMS=cpu"):
        cli.find_devices()


@pytest.fixture
def cache_setting() -> Any:
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_where_caches_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_setting: None
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == os.path.join(tmp_path, "ppo_jax", "xla")


def test_a_cache_of_ones_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    cli.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before


def test_the_preset_gives_defaults_and_flags_override_them() -> None:
    arguments, config = parse_arguments(["--preset", "qwen2.5-0.5b", "--gamma", "0.5"])
    assert arguments.output_dir == Path("runs/qwen2.5-0.5b")
    assert config.task.model == "Qwen/Qwen2.5-0.5B"
    assert config.ppo.gamma == 0.5
    assert config.ppo.gae_lambda == 0.95


def test_a_resumed_run_has_the_settings_it_was_started_with(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_run.parent)
    monkeypatch.setenv("HOME", str(finished_run.parent))
    for argv in (
        ["--output-dir=~/finished"],
        ["--output-dir", "finished"],
        ["--preset", "pocket", "--output-dir", "finished"],
    ):
        arguments, config = parse_arguments([*argv, "--resume"])
        assert arguments.output_dir.resolve() == finished_run.resolve()
        assert config.ppo.batch_size == 4
    with pytest.raises(UsageError, match=r"runs/smollm2 holds no run to resume"):
        parse_arguments(["--preset", "smollm2", "--resume"])


def test_flags_may_be_written_with_underscores(tmp_path: Path) -> None:
    arguments, config = parse_arguments(["--output_dir", str(tmp_path), "--batch_size=8"])
    assert arguments.output_dir == tmp_path
    assert config.ppo.batch_size == 8
