"""The page in docs/ begins with the class docstring, which tells the whole truth.

Its examples run: those with other libraries in test_interop.py.
"""

import inspect
import re
from pathlib import Path

import gymnasium as gym
import pytest

from qwen_env.env import QwenTextEnv
from qwen_env.interaction import Reply
from qwen_env.rewards.loading import FORMS
from qwen_env.task import _RESET_OPTIONS
from qwen_env.vector_env import QwenTextVectorEnv

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "environment.md"
HEADINGS = [
    "Description",
    "Action Space",
    "Observation Space",
    "Starting State",
    "Rewards",
    "Turns",
    "Episode End",
    "Information",
    "Arguments",
    "Version History",
]
TEXT = inspect.cleandoc(QwenTextEnv.__doc__ or "")
PARTS = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))


def test_the_page_begins_with_the_docstring():
    copied, *own = re.split(r"\n(?=## With other libraries\n)", PAGE.read_text())
    assert copied == f"# QwenText-v0\n\n{TEXT}\n", (
        "one of them was changed: copy the docstring of QwenTextEnv into docs/environment.md"
    )
    assert len(own) == 1


def test_it_has_gymnasium_s_headings():
    assert PARTS[1::2] == HEADINGS
    assert all(section.strip() for section in SECTIONS.values())


@pytest.mark.parametrize("env", [QwenTextEnv, QwenTextVectorEnv])
def test_every_argument_is_there_with_its_default(env):
    for name, parameter in inspect.signature(env).parameters.items():
        default = parameter.default
        assert default is not parameter.empty, "everything has a default"
        if name == "reward":
            written = "`reward`"
        else:
            value = f'"{default}"' if isinstance(default, str) else repr(default)
            value = '"NextStep"' if name == "autoreset_mode" else value
            written = f"`{name}={value}`"
        assert written in SECTIONS["Arguments"]


def test_no_argument_is_there_that_the_environments_do_not_take():
    documented = set(re.findall(r"^- `(\w+)|, `(\w+)=", SECTIONS["Arguments"], re.MULTILINE))
    names = {name for pair in documented for name in pair if name}
    taken = {
        name
        for env in (QwenTextEnv, QwenTextVectorEnv)
        for name in inspect.signature(env).parameters
    }
    assert names == taken


def agreeing(batch):
    return [Reply(text="Yes.", info={"agrees": True}) for _ in batch]


def test_options_modes_and_forms_are_there():
    for option in (*_RESET_OPTIONS, "episode_seed", "reset_mask"):
        assert f'"{option}"' in SECTIONS["Starting State"]
    for mode in gym.vector.AutoresetMode:
        assert f'"{mode.value}"' in SECTIONS["Episode End"]
    for mode in QwenTextEnv.metadata["render_modes"]:
        assert f'"{mode}"' in SECTIONS["Arguments"]
    for form in re.findall(r"'([^' ]+)'", FORMS):
        assert form in SECTIONS["Arguments"]
    env = gym.make("QwenText-v0", interaction=agreeing)
    for name, space in env.observation_space.items():
        row = next(
            line for line in SECTIONS["Observation Space"].splitlines() if f"`{name}`" in line
        )
        assert f"{space.dtype}, shape {'(1,)' if space.shape == (1,) else '(S,)'}" in row


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", SECTIONS["Description"], re.DOTALL)
    variables: dict = {}
    exec(example, variables)
    assert variables["ended"]
    assert f"reward {variables['reward']:+.3f}" in capsys.readouterr().out


def readme_blocks(title):
    """The Python blocks under a heading of the README, down to the next."""
    sections = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    (section,) = (section for section in sections if section.startswith(f"{title}\n"))
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_environment_of_the_readme_runs(capsys):
    example, turns = readme_blocks("The environment in ten lines")
    assert len([line for line in example.splitlines() if line]) == 10
    variables: dict = {}
    exec(example, variables)
    assert variables["ended"]
    assert capsys.readouterr().out.endswith(f"]\n {variables['reward']}\n")
    exec(turns, variables)
    env = variables["env"]
    env.reset(seed=0)
    tokenizer = env.unwrapped.task.tokenizer
    for token in (*tokenizer.encode(" good"), tokenizer.eos_token_ids[0]):
        _, reward, terminated, _, info = env.step(token)
    assert (reward, terminated, info["reply"]) == (1.0, False, " And the music")


def test_the_reward_of_the_readme_scores():
    example, *_ = readme_blocks("Train on your own prompts and reward")
    variables: dict = {}
    exec(example, variables)
    prompts = [{"prompt": "The plot of this", "answer": "film"}]
    reward = variables["short_and_right"]
    env = gym.make("QwenText-v0", prompts=prompts, reward=reward, max_new_tokens=1)
    for text, score in ((" film", 0.99), (" drama", -0.01)):
        env.reset()
        (token,) = env.unwrapped.task.tokenizer.encode(text)
        assert env.step(token)[1] == pytest.approx(score)


def test_every_key_of_the_infos_is_there():
    env = gym.make("QwenText-v0", missing_eos_penalty=1.0, interaction=agreeing)
    _, at_reset = env.reset(seed=0)
    *_, at_end = env.step(env.unwrapped.task.rules.eos_token_ids[0])
    for name in (*at_reset, *at_end, *at_end["reward_components"]):
        assert f"`{name}`" in SECTIONS["Information"]
