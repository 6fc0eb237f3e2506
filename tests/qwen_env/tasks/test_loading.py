"""How a string names a task, and what the environments make of one."""

import copy
import inspect
import sys

import gymnasium as gym
import numpy as np
import pytest

from qwen_env.errors import UsageError
from qwen_env.task import make_task
from qwen_env.tasks import NamedTask, load_named_task
from qwen_env.tasks.loading import FORMS

MODULE = """
import numpy as np
from qwen_env.tasks import NamedTask

def accuracy(batch):
    right = [row["answer"] == text for row, text in zip(batch.rows, batch.completions)]
    right = np.array(right, np.float32)
    return right, {"accuracy": right}

def make():
    rows = [{"prompt": f"The number {i} was", "answer": " a"} for i in range(4)]
    return NamedTask("mine", rows[:3], rows[3:], accuracy, str.strip)

made = make()

def fails():
    return {}["colour"]

number = 5
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_tasks", "my_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("spec", ["my_tasks:make", "my_tasks:made"])
def test_a_task_of_ones_own(spec):
    task = load_named_task(spec)
    assert isinstance(task, NamedTask)
    assert (task.name, len(task.prompts), len(task.held_out)) == ("mine", 3, 1)
    assert load_named_task(task) is task
    assert copy.deepcopy(task) is task, "Gymnasium copies all arguments"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gsm8", "no task 'gsm8'; perhaps you meant 'gsm8k'; name one as 'gsm8k', "),
        ("nothing_near", "no task 'nothing_near'; name one as 'gsm8k', "),
        ("", "no task ''"),
        ("gsm8k?size=5", "gsm8k has no option 'size'; it takes none"),
        ("reasoning-gym:chain_sum", "no module 'reasoning-gym'; perhaps you meant 'reasoning_gym'"),
        ("no.such.module:f", "no module 'no.such.module'; it is looked for among"),
        (".my_tasks:make", "without leading dots"),
        ("my_tasks:missing", "my_tasks has no callable 'missing'"),
        ("my_tasks:number", "task my_tasks:number gives a int; it must be a qwen_env.tasks.Named"),
        ("my_tasks:accuracy", "cannot be made: TypeError: accuracy.. missing 1 required"),
        ("my_tasks:fails", r"cannot be made: KeyError: 'colour' \(.*my_tasks.py, line 17\)"),
        ("my_broken:make", "cannot be made: ZeroDivisionError"),
        (5, "task is 5; give a NamedTask, or a string"),
        (["gsm8k"], r"task is \['gsm8k'\]"),
    ],
)
def test_specifications_that_cannot_be(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_named_task(spec)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_forms_are_documented():
    text = inspect.getdoc(load_named_task) or ""
    for form in ("gsm8k", "reasoning_gym:", "package.module:callable"):
        assert form in FORMS and form in text


def test_the_environments_take_one():
    env = gym.make("QwenText-v0", task="my_tasks:make")
    task = env.unwrapped.task
    assert [prompt.text for prompt in task.prompts] == [f"The number {i} was" for i in range(3)]
    longest = max(len(prompt.ids) for prompt in task.prompts)
    assert task.rules.max_prompt_length == task.prompt_encoder.max_prompt_length == longest
    assert task.answer_of is not None and task.answer_of(" a ") == "a"
    env.reset(seed=0)
    env.step(*task.tokenizer.encode(" a"))
    _, reward, *_, info = env.step(task.rules.eos_token_ids[0])
    assert reward == 1 and info["reward_components"] == {"score": 1, "accuracy": 1}
    envs = gym.make_vec("QwenText-v0", num_envs=2, task=load_named_task("my_tasks:make"))
    _, info = envs.reset(seed=0)
    assert all(text.startswith("The number") for text in info["prompt"])


def test_the_same_reward_on_other_prompts():
    task = load_named_task("my_tasks:made")
    env = gym.make("QwenText-v0", task=task, prompts=task.held_out, max_prompt_length=50)
    assert [prompt.text for prompt in env.unwrapped.task.prompts] == ["The number 3 was"]
    assert env.unwrapped.task.rules.max_prompt_length == 50


def test_a_reward_beside_a_task():
    def mine(batch):
        return np.zeros(len(batch))

    with pytest.raises(UsageError, match="task mine has a reward of its own; leave task or reward"):
        make_task(task="my_tasks:make", reward=mine)


def test_messages_name_the_task():
    with pytest.raises(UsageError, match=r"mine\[0\] holds a prompt of .* over the limit of 1;"):
        make_task(task="my_tasks:make", max_prompt_length=1)


def test_without_a_task_all_is_as_it_was():
    task = make_task()
    assert task.rules.max_prompt_length == 32 and task.answer_of is None
