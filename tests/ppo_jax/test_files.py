import errno
import os
import shutil
from pathlib import Path

import pytest

from ppo_jax.files import atomic, disk_errors, folder_digest, locked
from qwen_env.errors import RunError

NO_ROOM = "runs/x cannot be written: No space left on device; "


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # As Orbax and safetensors have it.
        ValueError("RESOURCE_EXHAUSTED: Failed to write 7 bytes [os_error_code='28']"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_an_error_of_the_systems_is_a_sentence(error: Exception) -> None:
    with pytest.raises(RunError, match=NO_ROOM), disk_errors(Path("runs/x")):
        raise error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match=r"^odd$"), disk_errors(Path("runs/x")):
        raise ValueError("odd")


def test_a_file_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    with atomic(path) as partial:
        partial.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: os.rmdir("/dev/null"))
    message = r"config.json cannot be written: Not a directory"
    with pytest.raises(RunError, match=message), atomic(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "old"


def test_a_folder_has_a_digest_of_its_files(tmp_path: Path) -> None:
    one = tmp_path / "one"
    (one / "inner").mkdir(parents=True)
    (one / "a").write_text("1")
    (one / "inner" / "b").write_text("2")
    other = Path(shutil.copytree(one, tmp_path / "other"))
    assert folder_digest(other) == folder_digest(one)
    (other / "a").write_text("2")
    assert folder_digest(other) != folder_digest(one)
    (other / "a").write_text("1")
    (other / "inner" / "b").rename(other / "b")
    assert folder_digest(other) != folder_digest(one)


def test_a_folder_is_locked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with locked(tmp_path) as is_ours:
            assert is_ours is True
            with locked(tmp_path) as is_theirs:
                assert is_theirs is False

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path) as is_known:
        assert is_known is None
