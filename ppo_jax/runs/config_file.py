"""`config.json` of a run folder: the settings and, beside them, what wrote them.

    task, ppo, optimizer, run   the settings of PPO, as in `ppo_jax.config`; those of other runs
                                have `data` and `learning` in the place of the first two
    command                     what started the run; "ppo-train", if it is not there
    created_by                  command line and versions that the run was started with
    resumed_by                  likewise, of the last time that it was resumed

User names and passwords in URLs are replaced with `***`.
"""

import json
import platform
import shlex
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, overload

from ppo_jax.config import RunSettings, TrainConfig, as_json, from_json
from ppo_jax.files import atomic, write_json
from qwen_env.errors import UsageError
from qwen_env.rewards.addresses import HIDDEN, redacted

Settings = dict[str, dict[str, Any]]
Config = TypeVar("Config", bound=RunSettings)

_MAY_CHANGE = {
    "num_iterations",
    "eval_every",
    "eval_size",
    "save_every",
    "keep_checkpoints",
    "num_devices",
    "num_shards",
    "rollout_slots",
    "log_to",
    "inspect_size",
}
_PACKAGES = {"ppo_jax": "qwen-ppo-jax", "jax": "jax", "jaxlib": "jaxlib", "flax": "flax"}


@overload
def read_config(folder: Path) -> TrainConfig: ...
@overload
def read_config(folder: Path, kind: type[Config]) -> Config: ...
def read_config(folder: Path, kind: type[Any] = TrainConfig) -> Any:
    """The settings of the run in `folder`, of which `kind` it must be.

    Raises:
        UsageError: there is no run, or its settings cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no run to resume (no config.json); leave out --resume to start one."
        )
    if not is_of(folder, kind):
        raise UsageError(
            f"{folder} holds a run of another command; resume it with {_command(folder)}."
        )
    try:
        return from_json(_read(path), kind)
    except KeyError as error:
        raise UsageError(f"{path} has no field {error}; another version wrote it.") from error
    except (ValueError, TypeError, RecursionError) as error:
        why = str(error).rstrip(".")
        raise UsageError(f"{path} is not the config of a run of this version: {why}.") from error


def is_of(folder: Path, kind: type[RunSettings]) -> bool:
    """Whether the run in `folder` has settings of that kind; True where they cannot be read."""
    try:
        return _command(folder) == kind.command
    except (OSError, ValueError, TypeError, RecursionError):
        return True


def write_config(folder: Path, config: RunSettings, argv: Sequence[str]) -> None:
    """Write the settings; what an earlier start or resumption wrote beside them stays.

    Args:
        argv: the command line's words.
    """
    path = folder / "config.json"
    old = _read(path) if path.exists() else {}
    by = {
        "arguments": shlex.join(map(redacted, argv)),
        "versions": _versions(),
    }
    content = (
        old
        | {"command": config.command}
        | settings(config)
        | {"resumed_by" if old else "created_by": by}
    )
    with atomic(path) as partial:
        write_json(partial, content)


def settings(config: RunSettings) -> Settings:
    """The settings as JSON gives them back."""
    written: Settings = json.loads(json.dumps(as_json(config)))
    return {
        group: {
            name: redacted(value) if isinstance(value, str) else value
            for name, value in fields.items()
        }
        for group, fields in written.items()
    }


def facts(config: RunSettings) -> dict[str, Any]:
    """What the processes of a run must have alike: settings, and versions of packages."""
    named = {name: value for fields in settings(config).values() for name, value in fields.items()}
    return named | _versions()


def check_same(folder: Path, config: RunSettings) -> None:
    """Check the settings that a run is to be resumed with against those in its folder.

    Raises:
        UsageError: they differ in one that must not change within a run.
    """
    for name, old, new in _changes(settings(read_config(folder, type(config))), settings(config)):
        raise UsageError(
            f"{folder} holds a run with {name} = {old!r}, not {new!r}; resume it without that "
            "flag, or start another run in another --output-dir."
        )
    for fields in as_json(config).values():
        for name, value in fields.items():
            if isinstance(value, str) and f"://{HIDDEN}@" in value:
                raise UsageError(
                    f"{folder / 'config.json'} keeps no user names and passwords; resume with "
                    f"{_as_flag(name, value)}, where *** are the user name and the password."
                )


def check_unedited(
    folder: Path, checkpoint: Settings, config: RunSettings, argv: Sequence[str]
) -> None:
    """Check the settings in `config.json` against those that a checkpoint was made with.

    Raises:
        UsageError: one was edited meanwhile, and is not named in `argv`, the command line.
    """
    named = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word[:2] == "--"}
    for name, old, new in _changes(checkpoint, settings(config)):
        if not named & {name, f"no_{name}"}:
            raise UsageError(
                f"{folder / 'config.json'} was edited: {name} is {new!r}, but the run has gone on "
                f"with {old!r} so far; put that back, or accept the change with "
                f"{_as_flag(name, new)}."
            )


def other_versions(folder: Path) -> list[str]:
    """The packages that the run was started with in another version ("jax 0.10.2, now 0.12.0")."""
    created_by = _read(folder / "config.json").get("created_by")
    if not isinstance(created_by, dict) or not isinstance(created_by.get("versions"), dict):
        return []
    old = created_by["versions"]
    return [
        f"{name} {old[name]}, now {new}"
        for name, new in _versions().items()
        if old.get(name, new) != new
    ]


def _command(folder: Path) -> str:
    command: str = _read(folder / "config.json").get("command", TrainConfig.command)
    return command


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not an object")
    return content


def _changes(old: Settings, new: Settings) -> Collection[tuple[str, Any, Any]]:
    """Name, old and new value of each setting that both have, differs, and must not change."""
    return [
        (name, old[group][name], value)
        for group, fields in new.items()
        for name, value in fields.items()
        if name not in _MAY_CHANGE and old.get(group, {}).get(name, value) != value
    ]


def _as_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(str(value))}"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            versions[name] = version(package)
        except PackageNotFoundError:  # a source tree on the path
            versions[name] = "unknown"
    return versions
