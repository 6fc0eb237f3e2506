import dataclasses
import itertools
import json
import pickle
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote, urlencode

import gymnasium as gym
import numpy as np
import pytest

import qwen_env  # noqa: F401
from qwen_env.errors import UsageError
from qwen_env.rewards import RewardError, http, score
from qwen_env.rewards.http import HTTPReward

FOLDER = Path(__file__).parent
unique = itertools.count()


@contextmanager
def serving(*flags):
    """The port of a server in a process of its own."""
    command = [sys.executable, FOLDER / "reward_server.py", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield int(process.stdout.readline())
        process.terminate()


@pytest.fixture(scope="module")
def server():
    """The address of a server."""
    with serving() as port:
        yield f"http://127.0.0.1:{port}"


def test_batches_rewards_and_components(server, make_batch):
    batch = make_batch(["a", "bb", "ccc", "é"], stars=4)
    scores = score(HTTPReward(server, batch_size=3), batch)
    assert scores.values.tolist() == [1, 2, 3, 1]
    assert scores.components["batch"].tolist() == [3, 3, 3, 1]
    assert score(HTTPReward(f"{server}/stars"), batch).values.tolist() == [4] * 4
    assert score(HTTPReward(server), make_batch([])).values.shape == (0,)


def test_conversations_are_sent_where_there_are_turns(server, make_batch, turns):
    reward = HTTPReward(f"{server}/messages")
    assert score(reward, turns).values.tolist() == [4]
    assert score(reward, make_batch(["a"])).values.tolist() == [0], "none are sent"
    turns.messages[0][2]["content"] = {1, 2}
    with pytest.raises(RewardError, match="cannot be sent to a reward server: "):
        score(reward, turns)


def test_in_the_environment(server):
    env = gym.make("QwenText-v0", reward=server, max_new_tokens=1)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(100)
    assert reward == len(info["completion"])


def test_it_tries_again_with_growing_pauses(server, make_batch, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    reward = HTTPReward(f"{server}/flaky", backoff=0.05)
    for _ in range(3):  # the server refuses each first and second request of three
        assert score(reward, make_batch(["a"])).values.tolist() == [1]
    assert pauses[:3] == [0, 0.05, 0.1]


def test_an_answer_that_comes_late_is_asked_for_again(server, make_batch):
    reward = HTTPReward(f"{server}/slow_at_first", timeout=0.3, retries=2, backoff=0.0)
    assert score(reward, make_batch(["a", "bb"])).values.tolist() == [1, 2]


def test_a_connection_that_breaks_is_made_again(server, make_batch):
    reward = HTTPReward(f"{server}/hangs_up_at_first", backoff=0.0)
    assert score(reward, make_batch(["a", "bb"])).values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/short", "must answer with an object whose 'rewards' are a list of 2 numbers"),
        ("/nan", "returned nan for row 1"),
        ("/words", "returned 'b' for row 1"),
        ("/bare_list", "must answer with an object whose 'rewards'"),
        ("/short_components", "as is each of its 'components'"),
        ("/list_components", "as is each of its 'components'"),
        ("/own_score", "names a component 'score'"),
        ("/text", "is not JSON"),
        ("/refuses", "answered 400 .*: no such model$"),
        ("/slow", r"gives no answer \(timed out\), 2 times"),
    ],
)
def test_failures_are_clear(server, make_batch, path, message):
    reward = HTTPReward(server + path, timeout=0.2, retries=1, backoff=0.0)
    with pytest.raises(RewardError, match=message):
        score(reward, make_batch(["a", "b"]))


@pytest.mark.parametrize("path", ["/gzip", "/chunked", "/byte_order_mark"])
def test_however_it_is_packed(server, make_batch, path):
    assert score(HTTPReward(server + path, retries=0), make_batch(["a", "bb"])).values[1] == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/drips", r"gives no answer \(timed out\), once"),
        ("/drips_headers", r"gives no answer \(timed out\), once"),
        ("/endless_status", r"gives no answer \(timed out\), once"),
        ("/endless_headers", r"gives no answer \(got more than 100 headers\)"),
        ("/endless_body", "the answer has more than 1000000 bytes"),
        ("/bomb", "the answer has more than 1000000 bytes"),
        ("/bad_gzip", r"gives no answer \(.*incorrect header"),
        ("/bad_chunk", r"gives no answer \(.*invalid literal for int"),
        (
            "/promises_more",
            r"gives no answer \(IncompleteRead\(\d+ bytes read, 1 more expected\)",
        ),
        ("/promises_less", "is not JSON: "),
        ("/resets", r"gives no answer \(Connection reset by peer\)"),
        ("/not_http", r"gives no answer \(SSH-2.0-OpenSSH_9.6\)"),
        ("/deep", "is not JSON: .*recursion"),
    ],
)
def test_a_server_that_breaks_the_rules(server, make_batch, monkeypatch, path, message):
    monkeypatch.setattr(http, "_LARGEST_ANSWER", 10**6)
    start = time.monotonic()
    with pytest.raises(RewardError, match=message) as caught:
        score(HTTPReward(server + path, timeout=0.5, retries=0), make_batch(["a", "bb"]))
    assert time.monotonic() - start < 5.0, "what a server sends without an end is not waited for"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("path", ["/escape", "/bare_text"])
def test_what_a_server_says_cannot_control_the_terminal(server, make_batch, path):
    with pytest.raises(RewardError, match=r"\\x1b\[2J\\x07") as caught:
        score(HTTPReward(server + path), make_batch(["a"]))
    assert str(caught.value).isprintable()
    with pytest.raises(RewardError, match=r"names a component '\\x1b\[2J\\x07'; names must be"):
        score(HTTPReward(f"{server}/escape_component"), make_batch(["a"]))


@pytest.mark.parametrize(
    ("asked_for", "pause"),
    [
        ("7", 7),
        ("0", 1),
        ("86400", 60),
        ("9" * 500, 60),
        ("soon", 1),
        ("-5", 1),
        (formatdate(0, usegmt=True), 1),
        (formatdate(2**33, usegmt=True), 60),
        ("in 30 s", pytest.approx(30, abs=3)),
    ],
)
def test_it_waits_as_long_as_the_server_asks_within_reason(
    server, make_batch, monkeypatch, asked_for, pause
):
    if asked_for == "in 30 s":
        asked_for = formatdate(time.time() + 30, usegmt=True)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    path = f"/later_at_first{next(unique)}"
    query = urlencode({"pause": asked_for})
    assert score(HTTPReward(f"{server}{path}?{query}"), make_batch(["a"])).values.tolist() == [1]
    assert pauses == [0, pause]


@pytest.mark.parametrize("status", [307, 308])
def test_a_request_is_repeated_where_the_server_says(server, make_batch, status):
    elsewhere = server.replace("127.0.0.1", "localhost")
    for to in ("/", f"{elsewhere}/", f"/moved?status=307&to={quote('/')}"):
        url = f"{server}/moved?" + urlencode({"status": status, "to": to})
        assert score(HTTPReward(url), make_batch(["a", "bb"])).values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("status", "to", "message"),
    [
        (301, "/new", r"answered 301: it has moved to {server}/new; name that address"),
        (302, "http://h:1/new", "answered 302: it has moved to http://h:1/new; name"),
        (303, "//u:p@h:1/new", r"answered 303: it has moved to http://\*\*\*@h:1/new; name"),
        (307, "file:///etc/passwd", "answered 307: it has moved to file:///etc/passwd"),
        (302, "/\x1b[2J", r"has moved to {server}/\\x1b\[2J; name"),
    ],
)
def test_a_redirect_that_would_lose_the_request(server, make_batch, status, to, message):
    url = f"{server}/moved?" + urlencode({"status": status, "to": to})
    with pytest.raises(RewardError, match=message.format(server=server)):
        score(HTTPReward(url), make_batch(["a"]))


def test_redirects_in_a_circle(server, make_batch):
    with pytest.raises(RewardError, match=r"redirects more than 5 times, at last to http.*/circle"):
        score(HTTPReward(f"{server}/circle"), make_batch(["a"]))


def test_a_password_is_used_and_not_shown(server, make_batch):
    def of(path):
        return server.replace("//", "//user:p%40ss%20w%C3%B6rd@") + path

    batch = make_batch(["a"])
    assert score(HTTPReward(of("/password")), batch).values.tolist() == [1]
    assert score(HTTPReward(f"{server}/no_password"), batch).values.tolist() == [1]
    moved = {
        "/password": server,  # the server that it was given for
        "/no_password": server.replace("127.0.0.1", "localhost"),
    }
    for path, host in moved.items():
        url = of("/moved?" + urlencode({"status": 307, "to": host + path}))
        assert score(HTTPReward(url), batch).values.tolist() == [1]
    for path in ("/refuses", "/text", "/moved?status=302&to=/new", "/not_http"):
        with pytest.raises(RewardError) as caught:
            score(HTTPReward(of(path), retries=0), batch)
        assert "user" not in str(caught.value)
    reward = pickle.loads(pickle.dumps(HTTPReward(of("/password"))))
    assert score(reward, batch).values.tolist() == [1]
    assert "user" not in reward.url + repr(reward)


def test_what_json_lacks_is_sent_as_null(server, make_batch):
    row = {
        "a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (np.float32("nan"), np.int64(3))},
        "e": np.array([[1.0, np.nan]]), "f": None, "g": True, 7: "seven",
    }  # fmt: skip
    expected = {
        "prompt": "The film", "a": None, "b": [None, 1.5], "c": {"d": [None, 3]},
        "e": [[1.0, None]], "f": None, "g": True, "7": "seven",
    }  # fmt: skip
    batch = dataclasses.replace(make_batch(["a"]), rows=[{"prompt": "The film"} | row])
    (name,) = score(HTTPReward(f"{server}/rows"), batch).components
    assert json.loads(name) == expected


def test_proxies_of_the_environment(server, make_batch, monkeypatch):
    """This machine is asked itself; others through the proxy, which here is the reward server."""
    monkeypatch.setenv("http_proxy", server.replace("//", "//user:p%40ss@"))
    monkeypatch.delenv("no_proxy", raising=False)
    for url in (server, "http://elsewhere.invalid/"):
        assert score(HTTPReward(url, retries=0), make_batch(["a"])).values.tolist() == [1]
    monkeypatch.setenv("no_proxy", "elsewhere.invalid")
    with pytest.raises(RewardError, match=r"elsewhere\.invalid/ gives no answer"):
        score(HTTPReward("http://elsewhere.invalid/", retries=0), make_batch(["a"]))


def test_https(make_batch, monkeypatch):
    with serving("--tls") as port:
        url = f"https://localhost:{port}"
        with pytest.raises(RewardError, match="certificate verify failed"):
            score(HTTPReward(url, retries=0), make_batch(["a"]))
        monkeypatch.setenv("SSL_CERT_FILE", str(FOLDER / "localhost.pem"))
        assert score(HTTPReward(url), make_batch(["a", "bb"])).values.tolist() == [1, 2]
        with pytest.raises(RewardError, match=r"gives no answer \(.*timed out\)"):
            score(HTTPReward(f"{url}/drips", timeout=0.3, retries=0), make_batch(["a"]))


def test_no_server(make_batch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RewardError, match=r"gives no answer .*refused.*, 3 times; start it"):
        score(HTTPReward(url, retries=2, backoff=0.0), make_batch(["a"]))


@pytest.mark.parametrize("value", [object(), {(1, 2): "a"}, {3}])
def test_rows_that_are_not_json(server, make_batch, value):
    batch = make_batch(["a", "b"])
    batch.rows[1] = {"picture": value}
    with pytest.raises(RewardError, match=r"^row 1 \(.* cannot be sent to a reward server: TypeE"):
        score(HTTPReward(server), batch)


def test_components_that_come_and_go(server, make_batch):
    with pytest.raises(RewardError, match="components that differ from batch to batch"):
        score(HTTPReward(f"{server}/moody", batch_size=2), make_batch(["a", "b", "c"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": "many"}, "batch_size is 'many'; it must be an integer"),
        ({"retries": -1}, "retries is -1; it must be at least 0"),
        ({"retries": 1.5}, "retries is 1.5; it must be an integer"),
        ({"timeout": None}, "timeout is None; it must be a finite number"),
        ({"timeout": 0}, "timeout is 0 and backoff 1.0; they are seconds"),
        ({"backoff": -1}, "backoff -1; they are seconds"),
        ({"url": "127.0.0.1:9"}, "the reward server is '127.0.0.1:9'; write it as 'http://HOST"),
        ({"url": "http://"}, "the reward server is 'http://'"),
        ({"url": "http://host:99999/"}, "the reward server is 'http://host:99999/'"),
        ({"url": "file:///etc/passwd"}, "the reward server is 'file:///etc/passwd'"),
        ({"url": None}, "the reward server is None"),
        ({"url": "http://host/a b"}, "http://host/a b'; write it as .*, percent-encoded"),
        ({"url": "http://host/\u00e9"}, "the reward server is 'http://host/\u00e9'"),
        ({"url": "http://u:p@host:0"}, r"the reward server is 'http://\*\*\*@host:0'"),
        ({"url": "http://u:p/w@host"}, r"the reward server is 'http://\*\*\*@host'"),
        ({"url": "http://u:p w@host"}, r"the reward server is 'http://\*\*\*@host'"),
        ({"url": "http://***@host/"}, "are not saved with a run; name it again, with them"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        HTTPReward(**({"url": "http://127.0.0.1:9"} | arguments))
