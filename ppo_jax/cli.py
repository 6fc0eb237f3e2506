"""What the entry points share: errors as one sentence with exit status 2, and JAX's start."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax
from gymnasium.error import DependencyNotInstalled

from ppo_jax.config import ProcessesConfig
from ppo_jax.hosts import is_first, joined
from ppo_jax.runs.interruption import EXIT_STATUS
from qwen_env.errors import UsageError, UserFacingError

_SIGPIPE = 141  # 128 + its number, as in shells


@contextlib.contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print an error that the user can fix on stderr, in one line, and exit with status 2."""
    try:
        yield
        sys.stdout.flush()
    except (UserFacingError, DependencyNotInstalled) as error:
        _fail(str(error))
    except BrokenPipeError:  # of `| head`, which has seen enough
        _drop_output()
        raise SystemExit(_SIGPIPE) from None
    except UnicodeEncodeError as error:
        lacking = ascii(error.object[error.start])
        _fail(
            f"The output's encoding ({error.encoding}) lacks {lacking}; set PYTHONIOENCODING=utf-8."
        )
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        if error.filename is None:
            _drop_output()
        _fail(f"{error.filename or 'The output cannot be written'}: {error.strerror}.")
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        size = re.search(r"([\d.]+) ?(bytes|[KMGT]iB)", str(error))
        wanted = f" ({_readable(*size.groups())} wanted)" if size else ""
        _fail(
            f"Out of memory{wanted}: lower batch_size or max_new_tokens, raise num_microbatches, "
            "or set --remat."
        )
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(EXIT_STATUS) from None


def _readable(number: str, unit: str) -> str:
    return f"{int(number) / 2**30:.1f} GiB" if unit == "bytes" else f"{number} {unit}"


def _drop_output() -> None:
    """Send what stdout still buffers to nowhere: it would fail again when Python exits."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None


def keep_compiled_programs() -> None:
    """Keep compiled programs on disk, so that a second run need not compile them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ppo_jax", "xla"))


@contextlib.contextmanager
def started(processes: ProcessesConfig) -> Iterator[None]:
    """Within the block, JAX runs, and this process has joined the others, if there are several.

    Raises:
        UsageError: JAX does not start, or the others cannot be found.
    """
    keep_compiled_programs()
    with joined(processes.coordinator, processes.num_processes, processes.process_id):
        find_devices()
        yield


def find_devices() -> None:
    """Start JAX now, so that its failure gets a sentence of its own.

    Raises:
        UsageError: it does not start.
    """
    jax.config.update("jax_transfer_guard", "allow")  # for programs that copy nothing by the way
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for CUDA that is not installed
        why = str(error) or "it is not installed"
        if platforms := os.environ.get("JAX_PLATFORMS"):
            raise UsageError(
                f"JAX cannot use JAX_PLATFORMS={platforms}: {why}; unset the variable, or install "
                "JAX for that platform."
            ) from error
        raise UsageError(
            f"JAX cannot start: {why}; repair the device's driver, or set JAX_PLATFORMS=cpu to run "
            "without the device."
        ) from error


def say(message: str) -> None:
    """Print a line on stderr, on the first process."""
    if is_first():
        print(message, file=sys.stderr)
