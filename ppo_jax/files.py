"""Files that are whole or not there, and a disk that is full in a sentence."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_env.errors import RunError

PARTIAL = ".partial"

# How libraries in other languages, whose errors are no OSErrors, name the system's.
_CODE = re.compile(r"os[ _]error(?:_code)?[ =]'?(\d+)")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within the block, an error of the operating system is a failure to write `path`.

    Raises:
        RunError: there was one; it names the path and says what is wrong.
    """
    try:
        yield
    except Exception as error:
        code = _CODE.search(str(error))
        if not isinstance(error, OSError) and not code:
            raise
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
        raise RunError(
            f"{path} cannot be written: {reason}; fix that, or choose another folder."
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends without an error."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        yield partial
        partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
