import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import pytest
from gymnasium.error import DependencyNotInstalled

from ppo_jax import cli
from ppo_jax.train import parse_arguments
from qwen_env.errors import UsageError


@dataclass(frozen=True)
class Flags:
    """Does a thing."""

    size: int = 3
    """How large."""
    kind: Literal["a", "b"] = "a"
    """Which one."""


def parse(*argv: str) -> Flags:
    return cli.parse(Flags, argv, prog="python -m thing")


def test_flags_over_defaults() -> None:
    assert parse() == Flags()
    assert parse("--size", "4", "--kind", "b") == Flags(4, "b")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sise", "4"], "--sise"),
        (["--size", "four"], "four"),
        (["--size"], "--size"),
        (["--kind", "c"], "'c'"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_are_one_sentence(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(*argv)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert not set(message) & set("│╭╮╰╯─")
    assert message.endswith("See python -m thing --help.")


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code in (0, None)
    assert "How large." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UsageError("one\n  thing is wrong."), "error: one thing is wrong.\n"),
        (DependencyNotInstalled("run: pip install x"), "error: run: pip install x\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"),
            "error: runs/x/metrics.jsonl: No space left on device.\n",
        ),
    ],
)
def test_errors_a_person_can_mend(
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


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), cli.errors_as_sentences():
        raise ZeroDivisionError


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


def test_flags_may_be_written_with_underscores(tmp_path: Path) -> None:
    arguments, config = parse_arguments(["--output_dir", str(tmp_path), "--batch_size=8"])
    assert arguments.output_dir == tmp_path
    assert config.ppo.batch_size == 8
