"""Stop strings against a loop that decodes the response after each token and searches it."""

import itertools
import pickle

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qwen_env  # noqa: F401
from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.stop_strings import make_stop_strings
from qwen_env.task import make_task

PROMPT = "The film: "
# Of the tokenizer of conftest.py: three special ids, then bytes, then merges.
EOS, IM_START, FIRST_TEXT, SIZE = 2, 1, 3, 294


def task_of(backend, **arguments):
    return make_task(
        tokenizer=backend,
        eos_token_ids=EOS,
        prompts=[PROMPT],
        max_prompt_length=16,
        reward=lambda batch: [0.0] * len(batch),
        **arguments,
    )


def end_of(task, ids):
    """How many tokens the MDP takes, and the reason it names."""
    state = task.initial_state([task.prompts[0]])
    for token in ids:
        state = mdp.step(state, np.array([token]), task.rules, np)
    stopped, terminated = mdp.was_stopped(state).item(), state.terminated.item()
    reason = "stop" if stopped else "eos" if terminated else "length"
    return mdp.response_length(state).item(), reason


def end_by_decoding(task, ids, strings, min_new_tokens=0):
    for count, token in enumerate(ids, start=1):
        text = task.tokenizer.decode(ids[:count])
        if count >= min_new_tokens and any(string in text for string in strings):
            return count, "stop"
        if token == EOS:
            return count, "eos"
    return len(ids), "length"


@settings(deadline=None)
@given(data=st.data())
def test_where_decoding_finds_them(backend, data):
    """Any ids, half characters and special tokens among them; strings that often occur."""
    ids = st.lists(st.integers(0, SIZE - 1) | st.integers(FIRST_TEXT, 270), min_size=4, max_size=12)
    ids = data.draw(
        ids | st.text("ab é好🎬", min_size=8).map(lambda text: backend.encode(text).ids)
    )
    assume(len(ids) >= 4)
    text = backend.decode(ids)
    pieces = [
        text[start : start + data.draw(st.integers(1, 4))]
        for start in data.draw(st.lists(st.integers(0, max(len(text) - 1, 0)), max_size=2))
    ]
    strings = tuple({p for p in pieces if p and "\ufffd" not in p} or {"好"})
    min_new_tokens = data.draw(st.sampled_from([0, 0, 3]))
    assume(EOS not in ids[:min_new_tokens])
    limits = {"min_new_tokens": min_new_tokens, "max_new_tokens": len(ids)}
    task = task_of(backend, stop=strings, **limits)
    assert end_of(task, ids) == end_by_decoding(task, ids, strings, min_new_tokens)


def test_half_characters(backend):
    """A character whose bytes are tokens of their own ends the response with its last byte."""
    task = task_of(backend, stop="好!")
    ids = [FIRST_TEXT, *backend.encode("好").ids[:2], *backend.encode("好!?").ids]
    assert end_of(task, ids) == (len(ids) - 1, "stop")


def test_special_tokens_in_between_do_not_count(backend):
    ids = [*backend.encode("</ans").ids, IM_START, *backend.encode("wer>").ids]
    assert end_of(task_of(backend, stop="</answer>"), ids) == (len(ids), "stop")


def test_the_prompt_ends_nothing_and_begins_nothing(backend):
    assert end_of(task_of(backend, stop=["film", ": b"]), backend.encode("bad").ids)[1] == "length"


def test_a_token_that_holds_more_than_the_string(backend):
    (merged,) = (i for text, i in backend.get_vocab().items() if text == "Ġfilm")
    assert end_of(task_of(backend, stop="il"), [FIRST_TEXT, merged, FIRST_TEXT]) == (2, "stop")


def test_stopped_at_the_limit_is_not_cut_off(backend):
    task = task_of(backend, stop="b", max_new_tokens=2, missing_eos_penalty=1.0)
    assert end_of(task, backend.encode("ab").ids) == (2, "stop")
    assert end_of(task, backend.encode("aa").ids) == (2, "length")


def test_an_early_one_waits_for_min_new_tokens(backend):
    task = task_of(backend, stop="ab", min_new_tokens=4)
    assert end_of(task, backend.encode("abcdefg").ids) == (4, "stop")


def test_the_environments_say_so(backend):
    arguments = {
        "tokenizer": backend,
        "eos_token_ids": EOS,
        "prompts": [PROMPT],
        "stop": ["</answer>", "\n\n"],
        "missing_eos_penalty": 1.0,
        "reward": lambda batch: [float(reason == "stop") for reason in batch.finish_reasons],
    }
    env = gym.make("QwenText-v0", **arguments)
    envs = gym.make_vec("QwenText-v0", num_envs=2, **arguments)
    env.reset(seed=0)
    envs.reset(seed=0)
    ids = backend.encode("it's 4</answer>").ids
    for token in ids:
        _, reward, terminated, truncated, info = env.step(token)
        _, rewards, terminations, _, infos = envs.step([token, FIRST_TEXT])
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["finish_reason"], info["completion"]) == ("stop", "it's 4</answer>")
    assert info["completion_length"] == len(ids)
    assert info["reward_components"]["missing_eos_penalty"] == 0.0
    assert (rewards.tolist(), terminations.tolist()) == ([1.0, 0.0], [True, False])
    assert infos["finish_reason"].tolist() == ["stop", None]
    envs.step([FIRST_TEXT, FIRST_TEXT])  # row 0 begins again
    *_, infos = envs.step([EOS, EOS])
    assert infos["finish_reason"].tolist() == ["eos", "eos"]


def test_equal_tasks_have_equal_rules(backend):
    """So that what was compiled for one serves the other."""
    one, other, third = (task_of(backend, stop=stop).rules for stop in ("ab", ["ab"], "ba"))
    assert one == other != third
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one


@settings(deadline=None)
@given(
    texts=st.lists(st.text("ab", max_size=3), min_size=1, max_size=3),
    string=st.text("ab", min_size=1, max_size=5),
    at_most=st.integers(1, 4),
)
def test_a_string_is_refused_if_no_response_contains_it(texts, string, at_most):
    responses = ("".join(some) for some in itertools.product(texts, repeat=at_most))
    can_occur = any(string in response for response in responses)
    try:
        make_stop_strings(
            (string,),
            dict(enumerate(map(str.encode, texts))),
            vocab_size=len(texts),
            usable_ids=range(len(texts)),
            max_new_tokens=at_most,
        )
    except UsageError as error:
        assert f"which no response of {at_most} tokens can contain" in str(error)
        assert not can_occur
    else:
        assert can_occur


def test_forbidden_and_end_tokens_spell_nothing(backend):
    (byte,) = backend.encode("~").ids
    task_of(backend, stop="~")
    for arguments in ({"forbidden_token_ids": [byte]}, {"eos_token_ids": [EOS, byte]}):
        with pytest.raises(UsageError, match="stop holds '~', which no response"):
            make_task(
                tokenizer=backend, prompts=["a"], stop="~", **({"eos_token_ids": EOS} | arguments)
            )


def test_with_the_pocket_tokenizer():
    task = make_task(stop=["was", "good"])
    tokenizer = task.tokenizer
    rng = np.random.default_rng(0)
    words = [" film", " was", " wasted", " good", " goo", "d", " the", "wa", "s"]
    for _ in range(50):
        ids = tokenizer.encode("".join(rng.choice(words, 8)))
        count, reason = end_by_decoding(task, ids, ["was", "good"])
        assert end_of(task, ids) == (count, reason)
