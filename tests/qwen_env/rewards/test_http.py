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


def test_it_tries_again_with_growing_pauses(server, make_batch):
    reward = HTTPReward(f"{server}/flaky", backoff=0.05)
    start = time.monotonic()
    assert score(reward, make_batch(["a"])).values.tolist() == [1]
    assert time.monotonic() - start < 1
    # Three attempts in a row reach an attempt that is answered.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/short", "must answer with an object whose 'rewards' are a list of 2 numbers"),
        ("/nan", "returned nan for row 1"),
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


def test_rows_that_are_no_json(server, make_batch):
    with pytest.raises(RewardError, match="JSON serializable"):
        score(HTTPReward(server), make_batch(["a"], picture=object()))


def test_wrong_arguments():
    with pytest.raises(UsageError, match="batch_size is 0"):
        HTTPReward("http://127.0.0.1:9", batch_size=0)
