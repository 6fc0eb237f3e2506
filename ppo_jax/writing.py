"""Files that are whole or not there, and a disk that is full in a sentence."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_env.errors import UsageError

PARTIAL = ".partial"

# How libraries in other languages, whose errors are no OSErrors, name the system's.
_CODE = re.compile(r"os[ _]error(?:_code)?[ =]'?(\d+)")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, an error of the system's is one of writing `path`.

    Raises:
        UsageError: there was one; it names the path and says what is wrong.
    """
    try:
        yield
    except Exception as error:
        code = _CODE.search(str(error))
        if not isinstance(error, OSError) and not code:
            raise
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path} cannot be written: {reason}; see to that, or choose another folder."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a whole file or, if the process is killed meanwhile, nothing."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
