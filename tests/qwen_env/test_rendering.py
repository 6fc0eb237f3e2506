import gymnasium as gym
import pytest
from gymnasium.error import ResetNeeded

import qwen_env  # noqa: F401
from qwen_env.env import QwenTextEnv
from qwen_env.rendering import printable

EOS = 2


def length_reward(batch):
    return [float(len(ids)) for ids in batch.completion_ids]


@pytest.mark.parametrize("mode", [None, *QwenTextEnv.metadata["render_modes"]])
def test_close_ends_the_line_once(mode, capsys):
    env = gym.make("QwenText-v0", render_mode=mode)
    env.reset(seed=0)
    env.step(40)
    for _ in range(2):
        env.close()
    printed = capsys.readouterr().out
    assert printed.count("\n") == (mode == "human")


def test_ansi_rendering(backend):
    env = QwenTextEnv(
        tokenizer=backend, eos_token_ids=EOS, prompts=["a plot"], reward=length_reward,
        max_new_tokens=5, render_mode="ansi",
    )  # fmt: skip
    env.reset()
    assert env.render() == "a plot|"
    first, second = backend.encode("é").ids
    env.step(first)
    assert env.render() == "a plot|", "half a character is not shown"
    env.step(second)
    assert env.render() == "a plot|é"
    env.step(backend.encode("\x1b").ids[0])
    assert env.render() == "a plot|é\\x1b", "a terminal would obey it"
    env.step(EOS)
    assert env.render() == "a plot|é\\x1b\n[eos after 4 tokens, reward +4.000]\n"


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("naïve 世界\n", "naïve 世界\n"),
        ("全\u3000角\u00a0", "全\u3000角\u00a0"),
        ("\x1b[31m\t\r\u200f", "\\x1b[31m\\t\\r\\u200f"),
    ],
)
def test_spaces_of_all_kinds_stay_and_control_characters_are_escaped(text, printed):
    assert printable(text) == printed


@pytest.mark.parametrize("mode", ["ansi", "human"])
def test_render_after_every_step_through_make(mode, capsys):
    env = gym.make("QwenText-v0", render_mode=mode, max_new_tokens=3)
    with pytest.raises(ResetNeeded):
        env.render()
    env.reset(seed=0)
    texts = [env.render()]
    for action in env.unwrapped.task.tokenizer.encode(" is very dull"):
        env.step(action)
        texts.append(env.render())
    if mode == "ansi":
        assert all(isinstance(text, str) and text for text in texts)
        assert len(set(texts)) == 4
    else:
        assert texts == [None] * 4
        assert "[length after 3 tokens, reward" in capsys.readouterr().out


def test_gymnasium_collects_the_renderings():
    env = gym.make("QwenText-v0", render_mode="ansi_list", max_new_tokens=2)
    env.reset(options={"prompt": "The plot"})
    env.step(100)
    env.step(100)
    frames = env.render()
    assert len(frames) == 3
    assert frames[0] == "The plot|"
    assert "[length after 2 tokens" in frames[-1]


def test_human_rendering_prints_what_ansi_says(backend, capsys):
    arguments = {
        "tokenizer": backend, "eos_token_ids": EOS, "prompts": ["a plot"], "reward": length_reward
    }  # fmt: skip
    human, ansi = (QwenTextEnv(render_mode=mode, **arguments) for mode in ("human", "ansi"))
    for env in (human, ansi):
        env.reset()
        for action in (*backend.encode(" naïve").ids, EOS):
            env.step(action)
    assert capsys.readouterr().out == ansi.render()
    assert human.render() is None
    human.reset()
    human.step(40)
    human.reset()
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 2, "an episode that is given up ends its line"
    assert lines[1] == "a plot|"


def test_render_without_a_mode_warns():
    env = QwenTextEnv()
    env.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
