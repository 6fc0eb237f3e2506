import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import pytest

import qwen_env  # noqa: F401
from qwen_env.errors import UsageError
from qwen_env.rewards import RewardError, score
from qwen_env.rewards.http import HTTPReward


@pytest.fixture(scope="module")
def server():
    """The address of a server in a process of its own."""
    program = Path(__file__).parent / "reward_server.py"
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()


def test_batches_rewards_and_components(server, make_batch):
    batch = make_batch(["a", "bb", "ccc", "é"], stars=4)
    scores = score(HTTPReward(server, batch_size=3), batch)
    assert scores.values.tolist() == [1, 2, 3, 1]
    assert scores.components["batch"].tolist() == [3, 3, 3, 1]
    assert score(HTTPReward(f"{server}/stars"), batch).values.tolist() == [4] * 4
    assert score(HTTPReward(server), make_batch([])).values.shape == (0,)


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
    assert pauses[-2:] == [0.05, 0.1]


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
        ("/slow", r"cannot be reached \(timed out\), 2 times"),
    ],
)
def test_failures_are_clear(server, make_batch, path, message):
    reward = HTTPReward(server + path, timeout=0.2, retries=1, backoff=0.0)
    with pytest.raises(RewardError, match=message):
        score(reward, make_batch(["a", "b"]))


def test_no_server(make_batch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RewardError, match=r"cannot be reached .*refused.*, 3 times; start it"):
        score(HTTPReward(url, retries=2, backoff=0.0), make_batch(["a"]))


def test_rows_that_are_not_json(server, make_batch):
    with pytest.raises(RewardError, match="JSON serializable"):
        score(HTTPReward(server), make_batch(["a"], picture=object()))


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
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        HTTPReward(**({"url": "http://127.0.0.1:9"} | arguments))
