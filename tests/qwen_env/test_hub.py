import errno
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from qwen_env.errors import UsageError
from qwen_env.hub import resolve


def download(monkeypatch, answer):
    def snapshot_download(name, allow_patterns):
        if isinstance(answer, Exception):
            raise answer
        return f"{answer}/{name}/{allow_patterns[0]}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert resolve(tmp_path, allow_patterns=[]) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", allow_patterns=[]) == Path("org/name"), "before any hub id"


def test_a_hub_id_is_downloaded(monkeypatch):
    download(monkeypatch, "/cache")
    assert resolve("Qwen/Qwen2.5-0.5B", allow_patterns=["*.json"]) == Path(
        "/cache/Qwen/Qwen2.5-0.5B/*.json"
    )


@pytest.mark.parametrize("name", ["./x", "../a/b", "/a/b", "a/b/c", "~/none", Path("org/name")])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(name):
    with pytest.raises(UsageError, match=r"no such folder.$"):
        resolve(name, allow_patterns=[])


def test_a_file_is_not_a_folder(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"model.safetensors is a file; name the folder"):
        resolve("model.safetensors", allow_patterns=[])


def test_what_is_neither_folder_nor_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    for name, kind in {"pipe": "a pipe", "link": "a link to a file that is not there"}.items():
        with pytest.raises(UsageError, match=f"^{name} is {kind}; name the folder"):
            resolve(name, allow_patterns=[])
    for name, message in {"a\0b": "null", "a" * 999: "too long", "~nobody-here/a": "user"}.items():
        with pytest.raises(UsageError, match=f"cannot be read: .*{message}"):
            resolve(name, allow_patterns=[])


def test_a_name_that_the_hub_does_not_take():
    with pytest.raises(UsageError, match=r"my--tok: no such folder, and no such repository"):
        resolve("my--tok", allow_patterns=[])


class NetworkError(Exception):
    """As of httpx, which is no OSError."""


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network"), NetworkError("reset")])
def test_a_hub_that_cannot_be_reached(monkeypatch, error):
    download(monkeypatch, error)
    with pytest.raises(UsageError, match=r"hub cannot be reached; .*local folder.*\.gguf.*pocket"):
        resolve("Qwen/Qwen2.5-0.5B", allow_patterns=[])


def test_a_full_disk(monkeypatch):
    download(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UsageError, match=r"0.5B cannot be downloaded: No space left on device.$"):
        resolve("Qwen/Qwen2.5-0.5B", allow_patterns=[])


def test_a_repository_that_is_not_there(monkeypatch):
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    download(monkeypatch, error)
    with pytest.raises(UsageError, match="no such repository"):
        resolve("Qwen/Qwen2.5-0.5", allow_patterns=[])
