import itertools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded

import qwen_env  # noqa: F401
from qwen_env.env import QwenTextEnv
from qwen_env.rendering import picture, printable

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


def test_pictures_through_make():
    env = gym.make("QwenText-v0", render_mode="rgb_array", max_new_tokens=3)
    envs = gym.make_vec("QwenText-v0", num_envs=2, render_mode="rgb_array", max_new_tokens=3)
    for e in (env, envs):
        e.reset(options={"prompt": "The plot"})
    before = env.render()
    assert (before.dtype, before.shape) == (np.uint8, (480, 800, 3))
    np.testing.assert_array_equal(before, picture("The plot|"))
    action = env.unwrapped.task.tokenizer.encode(" dull")[0]
    env.step(action)
    envs.step([action, action])
    for after in (env.render(), *envs.render()):
        np.testing.assert_array_equal(after, picture("The plot| dull"))
    assert not np.array_equal(before, after)


def ink(text):
    """Which of the 24 x 80 places of the picture of `text` hold a character."""
    rows, columns = 24, 80
    font_width = 9.63  # that of DejaVu Sans Mono, 1233 / 2048 em, at 16 pixels an em
    dark = (picture(text) < 128).any(axis=-1).reshape(rows, 20, 800).any(axis=1)
    edges = np.round(np.arange(columns + 1) * font_width).astype(int)
    return np.array(
        [[row[a + 1 : b - 1].any() for a, b in itertools.pairwise(edges)] for row in dark]
    )


def test_a_picture_shows_what_fits_a_terminal():
    """Lines of 80 characters, of a long text the last 24."""
    page = ink("x" * 83 + "\n\n  é")
    assert page[0].all()
    assert np.flatnonzero(page[1]).tolist() == [0, 1, 2]
    assert not page[2].any()
    assert np.flatnonzero(page[3]).tolist() == [2]
    assert not page[4:].any()
    assert ink("x\n" * 3 + "x" * 80 + "\n" * 23)[0].all()
    assert not ink("x" * 80 + "\n" * 24).any()


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
