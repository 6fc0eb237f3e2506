import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax
import jax
import pytest

from ppo_jax.config import TrainConfig, preset
from ppo_jax.runs import config_file
from ppo_jax.runs.config_file import (
    check_same,
    check_unedited,
    other_versions,
    read_config,
    settings,
    write_config,
)
from qwen_env.errors import UsageError

CONFIG = preset("pocket")


def changed(group: str, **changes: Any) -> TrainConfig:
    return replace(CONFIG, **{group: replace(getattr(CONFIG, group), **changes)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_config(tmp_path, CONFIG, ["--preset", "pocket"])
    return tmp_path


def content(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def edit(run: Path, group: str, **changes: Any) -> None:
    whole = content(run)
    whole[group] |= changes
    (run / "config.json").write_text(json.dumps(whole))


def test_what_is_written_is_read(run: Path) -> None:
    assert read_config(run) == CONFIG
    other = changed("ppo", clip_range=0.3)
    write_config(run, other, [])
    assert read_config(run) == other


def test_command_lines_and_versions_stand_beside_the_settings(run: Path) -> None:
    write_config(run, CONFIG, ["--resume", "--output-dir", "my run"])
    found = content(run)
    assert found["created_by"]["arguments"] == "--preset pocket"
    assert found["created_by"]["versions"]["jax"] == jax.__version__
    assert found["created_by"]["versions"]["flax"] == flax.__version__
    assert found["resumed_by"]["arguments"] == "--resume --output-dir 'my run'"
    assert other_versions(run) == []


def test_other_versions_are_told_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_file, "version", lambda package: f"99-{package}")
    changes = other_versions(run)
    assert f"jax {jax.__version__}, now 99-jax" in changes
    assert [change.split()[0] for change in changes] == ["ppo_jax", "jax", "jaxlib", "flax"]


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("http://me:p4ss@host:8000/score", "http://***@host:8000/score"),
        (
            "0.5 * https://me:p@4ss@host/x + http://a.b/c@d",
            "0.5 * https://***@host/x + http://a.b/c@d",
        ),
        ("http://host/score?user=a@b", "http://host/score?user=a@b"),
    ],
)
def test_passwords_are_not_written(run: Path, url: str, written: str) -> None:
    config = changed("task", reward=url)
    write_config(run, config, ["--reward", url, f"--gold-reward={url}"])
    found = content(run)
    assert found["task"]["reward"] == written
    assert "4ss" not in (run / "config.json").read_text()
    check_same(run, config)
    check_unedited(run, found, config, [])
    if written != url:
        with pytest.raises(UsageError, match=r"keeps no user names and passwords.*--reward '.*\*"):
            check_same(run, read_config(run))


def test_another_setting_is_named(run: Path) -> None:
    with pytest.raises(UsageError, match=r"clip_range = 0\.2, not 0\.3"):
        check_same(run, changed("ppo", clip_range=0.3))


@pytest.mark.parametrize(
    ("group", "name", "value", "flag"),
    [
        ("run", "seed", 7, "--seed 7"),
        ("optimizer", "learning_rate", 0.1, "--learning-rate 0.1"),
        ("ppo", "whiten_rewards", True, "--whiten-rewards"),
        ("ppo", "top_k", 5, "--top-k 5"),
        ("task", "system_prompt", "be brief", "--system-prompt 'be brief'"),
    ],
)
def test_an_edit_is_noticed_and_can_be_accepted(
    run: Path, group: str, name: str, value: Any, flag: str
) -> None:
    edit(run, group, **{name: value})
    edited = read_config(run)
    check_same(run, edited)
    old = settings(CONFIG)[group][name]
    message = f"config.json was edited: {name} is {value!r}, but the run has gone on with {old!r}"
    with pytest.raises(UsageError, match=message) as error:
        check_unedited(run, settings(CONFIG), edited, ["--resume"])
    assert f"accept the change with {flag}." in str(error.value)
    word, *values = shlex.split(flag)
    for words in ([word, *values], ["=".join([word, *values])], [f"--{name}", *values]):
        check_unedited(run, settings(CONFIG), edited, words)


def test_what_may_change_may(run: Path) -> None:
    other = changed("run", num_iterations=7, eval_every=3, num_devices=2, rollout_slots=4)
    check_same(run, other)
    check_unedited(run, settings(CONFIG), other, [])


def test_a_setting_that_is_newer_than_the_checkpoint(run: Path) -> None:
    older = settings(CONFIG)
    del older["ppo"]["clip_range"]
    check_unedited(run, older, CONFIG, [])


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run to resume"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not the config"),
        (b"[]", "not the config"),
        (b'"\xff"', "not the config"),
        (b"[" * 100_000, "not the config"),
        (b"{}", "no field 'task'"),
        (b'{"task": {"modle": "x"}, "ppo": {}, "optimizer": {}, "run": {}}', "modle"),
        (b'{"task": [], "ppo": {}, "optimizer": {}, "run": {}}', "not the config"),
        (b'{"task": {}, "ppo": {"gamma": 3}, "optimizer": {}, "run": {}}', "gamma is 3"),
    ],
)
def test_a_config_that_cannot_be_read(run: Path, text: bytes, words: str) -> None:
    (run / "config.json").write_bytes(text)
    with pytest.raises(UsageError, match=words):
        read_config(run)
