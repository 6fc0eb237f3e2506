"""Files that are whole or not there, and a disk that is full in a sentence."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
    """A path to write a file to, which becomes `path` when the block ends without an error."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        try:
            yield partial
            sync(partial)
            partial.replace(path)
        except Exception:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that it holds, is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
        sync_folder(path)
    else:
        _fsync(path)


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk, though not what they hold."""
    if os.name == "nt":  # Windows opens no folders
        return
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that do not have it for folders
            raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends without an error.

    Whoever opens `folder` finds the old one or the new one, and the old one goes only when the new
    one is on the disk. Linux exchanges the two in one step; elsewhere there is none for an instant,
    and a process that is killed in that instant leaves the old one to `sweep`.
    """
    folder = folder.resolve()
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        scratch = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=PARTIAL, dir=folder.parent)
        )
    new, old = scratch / "new", scratch / "old"
    try:
        with disk_errors(folder), locked(scratch):
            new.mkdir()
            yield new
            sync(new)
            if not folder.exists():
                new.rename(folder)
            elif not _exchange(new, folder):
                folder.rename(old)
                try:
                    new.rename(folder)
                except BaseException:
                    old.rename(folder)
                    raise
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a `replacing_folder` that was killed has left beside `folder`."""
    folder = folder.resolve()
    scratch_name = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}{re.escape(PARTIAL)}")
    for scratch in folder.parent.iterdir():
        if scratch_name.fullmatch(scratch.name) and scratch.is_dir():
            with locked(scratch) as is_abandoned:
                if is_abandoned:
                    if (scratch / "old").exists() and not folder.exists():
                        (scratch / "old").rename(folder)
                    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Keep other processes out of `folder` within the block, if they ask too.

    Yields whether the folder is this process's own: False if another one has it, None if the system
    or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    is_ours: bool | None = True
    with ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        except OSError:
            is_ours = None
        yield is_ours


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change names in one step, if the system can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or a very old one
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)
    return done == 0


def folder_digest(folder: Path) -> str:
    """A digest of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
