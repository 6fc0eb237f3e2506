"""A folder that is replaced: readers find one version, whatever happens to the writer."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ppo_jax import files
from ppo_jax.files import replacing_folder, sweep
from qwen_env.errors import RunError


@pytest.fixture(params=["exchanged", "renamed away"])
def folder(request, tmp_path, monkeypatch):
    """Of version 1; replaced as on Linux, or as on systems that cannot exchange names."""
    if request.param == "renamed away":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    folder = tmp_path / "model"
    write(folder, 1)
    return folder


def write(folder, version):
    with replacing_folder(folder) as new:
        (new / "part").mkdir()
        for name in ("a", "part/b"):
            (new / name).write_text(str(version))


def read(folder):
    return {(folder / name).read_text() for name in ("a", "part/b")}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_is_replaced_and_nothing_is_left(folder):
    (folder / "more").write_text("")
    write(folder, 2)
    assert read(folder) == {"2"}
    assert names(folder) == ["a", "part"]
    assert names(folder.parent) == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failed_write_changes_nothing(error, folder):
    with pytest.raises(error), replacing_folder(folder) as new:
        (new / "a").write_text("2")
        raise error
    assert read(folder) == {"1"}
    assert names(folder.parent) == ["model"]


def test_a_failed_rename_brings_the_old_one_back(folder, monkeypatch):
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RunError, match="model cannot be written: Input/output error; fix that"):
        write(folder, 2)
    assert read(folder) == {"1"}
    assert names(folder.parent) == ["model"]


def test_what_is_written_is_on_the_disk_before_the_old_one_goes(folder, monkeypatch):
    synced, remove = [], files.shutil.rmtree

    def sync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    def removing(path, **options):
        in_place = {name.replace("new", "model") for name in map(os.path.basename, synced)}
        assert {"a", "b", "part", "model"} <= in_place
        assert str(folder.parent) == synced[-1]
        remove(path, **options)

    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.shutil, "rmtree", removing)
    write(folder, 2)
    assert read(folder) == {"2"}


KILLED = """
import os, signal, sys
from pathlib import Path
from ppo_jax import files
moment, folder = sys.argv[1], Path(sys.argv[2])
rename = Path.rename
def killing(self, target):
    if moment == "as the old one is away" and self.name == "new":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killing
if moment == "as the old one is away":
    files._exchange = lambda first, second: False
with files.replacing_folder(folder) as new:
    (new / "a").write_text("2")
    if moment == "as it writes":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["as it writes", "as the old one is away"])
def test_leftovers_of_a_writer_that_was_killed_are_swept(moment, folder):
    done = subprocess.run([sys.executable, "-c", KILLED, moment, str(folder)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(names(folder.parent)) == (2 if moment == "as it writes" else 1)
    sweep(folder)
    assert read(folder) == {"1"}
    assert names(folder.parent) == ["model"]
    write(folder, 3)
    assert read(folder) == {"3"}


def test_only_leftovers_of_this_folder_are_swept(folder):
    """Nor what another process is writing at the moment."""
    others = [".model-abcdefgh", ".model-2-abcdefgh.partial", ".models-abcdefgh.partial", "model-x"]
    for name in (*others, ".model-abcdefgh.partial"):
        (folder.parent / name).mkdir()
    (folder.parent / ".model-ijklmnop.partial").write_text("a file")
    with replacing_folder(folder) as new:
        assert new.parent.name in names(folder.parent)
        sweep(folder)
        assert new.is_dir()
    assert names(folder.parent) == sorted([*others, ".model-ijklmnop.partial", "model"])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="needs Linux's exchange")
def test_a_reader_always_finds_it(tmp_path):
    folder = tmp_path / "model"
    write(folder, 1)

    def replace():
        for version in range(2, 300):
            write(folder, version)

    writer = threading.Thread(target=replace)
    writer.start()
    seen = {"1"}
    while writer.is_alive():
        seen.add((folder / "a").read_text())  # FileNotFoundError where it is renamed away first
    writer.join()
    assert len(seen) > 20
    assert read(folder) == {"299"}
