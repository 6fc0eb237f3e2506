import os
import socket

import pytest

from qwen_env.errors import UsageError, reason
from qwen_env.files import expand, is_file, kind_of, read_json, read_text


def test_what_is_at_a_path(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert is_file(tmp_path / "file")
    assert is_file(tmp_path / "link")
    assert not is_file(tmp_path / "none")
    assert not is_file(tmp_path / "file" / "below")


def test_what_is_no_file_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # to open it would wait for a writer
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    kinds = {
        tmp_path / "fifo": "a pipe",
        tmp_path: "a folder",
        tmp_path / "broken": "a link to a file that is not there",
        tmp_path / "socket": "a socket",
        "/dev/zero": "a device",
    }
    for path, kind in kinds.items():
        assert kind_of(expand(path)) == kind
        with pytest.raises(UsageError, match=f"is {kind}; it must be a file"):
            is_file(expand(path))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_the_system_refuses(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be read: "):
        is_file(tmp_path / name)


def test_an_unknown_user_s_home():
    with pytest.raises(UsageError, match="there is no such user"):
        expand("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: "),
        (b"[]", "holds a list; it must hold an object"),
        (b"\xff", "is not UTF-8 text"),
        (b'{"x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "is not JSON: it is nested too deeply"),
        (b'{"x": ' + b"1" * 5000 + b"}", r"is not JSON: Exceeds the limit \(4300 digits\)"),
    ],
)
def test_wrong_json(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))


def test_json_that_is_not_there_is_empty(tmp_path):
    assert read_json(tmp_path / "none.json") == {}


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_reasons_are_short_and_in_one_line():
    assert reason(OSError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(ValueError("one.\ntwo.")) == "one"
    assert reason(MemoryError()) == "MemoryError"
    assert len(reason(ValueError("x" * 10**6))) < 400
