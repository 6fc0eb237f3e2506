import sys

import gymnasium as gym
import pytest

import qwen_env  # noqa: F401
from qwen_env.errors import UsageError
from qwen_env.rewards import load_reward, score
from qwen_env.rewards.addresses import redacted
from qwen_env.rewards.http import HTTPReward
from qwen_env.rewards.sentiment import pocket_sentiment

MODULE = """
calls = []
def count(batch):
    return [len(text) for text in batch.completions]
def ones(batch):
    return [1.0] * len(batch), {"part": [0.5] * len(batch)}
class Needs:
    def __init__(self, weights): ...
class NotCallable: ...
class Factory:
    def __init__(self): calls.append("made")
    def __call__(self, batch): return [7] * len(batch)
instance = Factory()
text = "no reward"
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current directory."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def test_functions_classes_and_instances(module, make_batch):
    batch = make_batch(["a", "bb"])
    for name, expected in [("count", [1, 2]), ("Factory", [7, 7]), ("instance", [7, 7])]:
        assert score(load_reward(f"{module}:{name}"), batch).values.tolist() == expected
    import my_rewards

    assert score(load_reward(my_rewards.Factory), batch).values.tolist() == [7, 7]
    assert load_reward(pocket_sentiment) is pocket_sentiment
    assert load_reward("qwen_env.rewards.sentiment:pocket_sentiment") is pocket_sentiment


@pytest.mark.parametrize(
    "spec",
    [
        "0.5 * my_rewards:count + my_rewards:ones",
        " 0.5*my_rewards:count +  1*my_rewards:ones ",
        {"count": (0.5, "my_rewards:count"), "ones": (1, "my_rewards:ones")},
        {"count": [0.5, "my_rewards:count"], "ones": [1, "my_rewards:ones"]},
    ],
)
def test_weighted_sums(module, make_batch, spec):
    scores = score(load_reward(spec), make_batch(["a", "bb"]))
    assert scores.values.tolist() == [1.5, 2.0]
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "count": [1, 2],
        "ones": [1, 1],
        "ones/part": [0.5, 0.5],
    }


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("http://a:1/rate + http://b:1/rate", ["http://a:1/rate", "http://b:1/rate"]),
        ("http://a:1/score + http://b:1/rate", ["http://a:1/score", "rate"]),
        ("http://u:p@a:1/x + http://v:q@b:1/x", ["http://***@a:1/x", "http://***@b:1/x"]),
        ("http://u:p@a + http://v:q@b:1/y", ["a", "y"]),
    ],
)
def test_names_that_are_taken_give_way_to_the_whole_spec(spec, names):
    assert list(load_reward(spec).terms) == names


def test_a_weighted_sum_in_the_environment(module):
    env = gym.make("QwenText-v0", reward="-0.5 * my_rewards:count", max_new_tokens=1)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(100)
    assert info["reward_components"] == {"score": reward, "count": len(info["completion"])}
    assert reward == -0.5 * len(info["completion"])


SECRETS = ("alice", "s3cret", "pa ss")


@pytest.mark.parametrize(
    "spec",
    [
        "http://alice:s3cret@host:0/",
        "HTTPS://alice:s3cret@host:99999/",
        "htp://alice:s3cret@host/",
        "alice:s3cret@host",
        "//alice:s3cret@host",
        "http://alice:s3cret/x@host/",
        "http://alice:pa ss@host/",
        "e * http://alice:s3cret@host/",
        "http://alice:s3cret@host/ + ",
        "http://alice:s3cret@host/ + http://alice:other@host/",
        "2 * http://alice:s3cret@host/ + no.such:thing",
        "my_rewards:count + htp://alice:s3cret@host/",
    ],
)
def test_messages_show_no_password(module, spec):
    with pytest.raises(UsageError) as caught:
        load_reward(spec)
    assert not any(secret in str(caught.value) for secret in SECRETS)


@pytest.mark.parametrize(
    ("spec", "written"),
    [
        ("http://alice:s3cret@host:1/x", "http://***@host:1/x"),
        ("HTTPS://alice@host", "HTTPS://***@host"),
        ("http://a:b@c@host/?q=1", "http://***@host/?q=1"),
        (
            "1 * http://a:b@host/ + 2.0*https://c@d/e@f",
            "1 * http://***@host/ + 2.0*https://***@d/e@f",
        ),
        ("http://host/path@2?mail=a@b", "http://host/path@2?mail=a@b"),
        ("my_rewards:count", "my_rewards:count"),
        ("--reward=http://a:b@host/", "--reward=http://***@host/"),
    ],
)
def test_what_is_written_of_a_reward(spec, written):
    assert redacted(spec) == written
    assert redacted(written) == written


def test_a_server():
    reward = load_reward("http://127.0.0.1:9/score")
    assert isinstance(reward, HTTPReward)
    assert reward.url == "http://127.0.0.1:9/score"
    assert load_reward(" http://127.0.0.1:9/score ").url == reward.url


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (3, "reward is 3; give a callable, or a string"),
        ("my_rewards", "reward is 'my_rewards'; .*package.module:callable"),
        ("no.such.module:f", "there is no module 'no.such.module'"),
        ("my_rewards:missing", "my_rewards has no callable 'missing'"),
        ("my_rewards:text", "my_rewards has no callable 'text'"),
        ("1 * my_rewards:count + 2 * my_rewards:count", "names 'my_rewards:count' twice"),
        ("1 * my_rewards:count + ", "empty term"),
        ("e * my_rewards:count", "'e' is not a weight"),
        ("nan * my_rewards:count", "the weight of 'count' in a weighted sum is nan; .* finite"),
        ("2 * my_rewards:count - my_rewards:ones", "no callable 'count - my_rewards:ones'"),
        ("", "reward is ''; give a callable"),
        ("my_rewards:", "reward is 'my_rewards:'; give a callable"),
        ("..rewards:f", "name the module in full, without leading dots"),
        (
            "my_rewards:NotCallable",
            "an instance of it cannot be called with a batch",
        ),
        ("my_rewards:Needs", "my_rewards:Needs: making one without arguments raised TypeError"),
        (dict, "reward <class 'dict'>: an instance of it cannot be called"),
        ("flax:folder", "'flax:' rewards belong to the training entry points; .* 'hf:FOLDER'"),
        ("http://", "the reward server is 'http://'; write it as"),
        ("hf:", "names no model; write 'hf:FOLDER_OR_HUB_ID'"),
        ("hf:?label=a", "names no model"),
        ({"a": (float("inf"), "my_rewards:count")}, "the weight of 'a' in a weighted sum is inf"),
        ({"a": ("1", "my_rewards:count")}, "the weight of 'a' in a weighted sum is '1'"),
        ({"a": 3}, "the term 'a' of a weighted sum is 3; it must be .weight, reward."),
        (
            {"score": (1, "my_rewards:count")},
            "names a term 'score'; names must be printable text, and none",
        ),
        ({3: (1, "my_rewards:count")}, "names a term 3"),
        ({"_a": (1, "my_rewards:count")}, "names a term '_a'"),
        ({}, "at least one term"),
        ({"a": "my_rewards:count"}, "the term 'a' of a weighted sum is 'my_rewards:count'"),
        ({"a": (1, "my_rewards:missing")}, "has no callable 'missing'"),
        ("hf:./none", "./none: no such folder"),
        ("hf:./none?colour=red", "option colour=red is not valid; the options are label, device"),
        ("hf:./none?batch_size=many", "option batch_size=many is not valid"),
        ("hf:./none?batch_size=", "option batch_size= is not valid"),
        ("hf:./none?device", "option device= is not valid"),
    ],
)
def test_wrong_specs(module, spec, message):
    with pytest.raises(UsageError, match=message):
        load_reward(spec)


def test_a_module_that_cannot_import_something_says_so(module, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("import no_such_package_at_all")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        load_reward("broken_rewards:f")
