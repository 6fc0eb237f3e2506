"""Files that other people made, read: a sentence for whatever is in the way."""

import json
import stat
from pathlib import Path
from typing import Any

from qwen_env.errors import UsageError, reason

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`; False if nothing is there.

    Raises:
        UsageError: something else is there, which could be read for ever (a pipe, a device), or it
            cannot be looked at.
    """
    kind = kind_of(path)
    if kind not in ("a file", "nothing"):
        raise UsageError(f"{path} is {kind}; it must be a file.")
    return kind == "a file"


def kind_of(path: Path) -> str:
    """What is at `path`: "a file", "nothing", "a folder", "a pipe", ...

    Raises:
        UsageError: it cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return "a link to a file that is not there"
        return "nothing"
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UsageError(f"{path} cannot be read: {reason(error)}.") from error
    return "a file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def expand(path: str | Path) -> Path:
    """`path` with the user's home for a tilde at its start.

    Raises:
        UsageError: it is the home of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} cannot be read: there is no such user.") from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no file.

    Raises:
        UsageError: it cannot be read, is not JSON, or holds something else.
    """
    if not is_file(path):
        return {}
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {json_error(error)}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; it must hold an object.")
    return content


class DuplicateKey(ValueError):
    """An object of JSON has `key` twice; of the two, most readers drop one in silence."""

    def __init__(self, key: str):
        super().__init__(f"{key!a} stands there twice")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON from its pairs, for `object_pairs_hook` of `json.loads`.

    Raises:
        DuplicateKey: two have one key.
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise DuplicateKey(key)
        content[key] = value
    return content


def json_error(error: ValueError | RecursionError) -> str:
    """What `json.loads` found wrong."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else reason(error)
