"""What the entry points share: flags, and errors as one sentence with exit status 2."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn, TypeVar

import jax
import tyro
from gymnasium.error import DependencyNotInstalled

from ppo_jax.interruption import EXIT_STATUS
from qwen_env.errors import UsageError

Arguments = TypeVar("Arguments")


def parse(
    kind: type[Arguments], argv: Sequence[str], *, prog: str, default: Arguments | None = None
) -> Arguments:
    """Parse flags into the dataclass `kind`; `default` holds the defaults, or None for its own.

    Raises:
        UsageError: an unknown flag, a missing one, or a value of the wrong type.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=prog,
                args=list(argv),
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UsageError(f"{_first_paragraph(said.getvalue())} See {prog} --help.") from None


@contextlib.contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print an error that the user can mend on stderr, in one line, and exit with status 2."""
    try:
        yield
    except (UsageError, DependencyNotInstalled) as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(EXIT_STATUS) from None


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None


def keep_compiled_programs() -> None:
    """Keep compiled programs on disk, so that a second run starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ppo_jax", "xla"))


def _first_paragraph(box: str) -> str:
    """The words at the top of one of tyro's boxes, above its first rule."""
    words: list[str] = []
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯─ ").strip()
        if line.startswith("╭") or (not text and not words):
            continue
        if not text or line.startswith("╰"):
            break
        words.append(text)
    sentence = " ".join(" ".join(words).split()) or box.strip()
    return sentence if sentence.endswith(".") else sentence + "."
