"""`--task`: prompts, held-out prompts and reward by one name, in every command."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppo_jax import evaluate, train
from ppo_jax.assembly import assemble
from ppo_jax.config import PRESETS, TaskConfig, TrainConfig, preset
from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.tasks import load_named_task

MODULE = '''
import numpy as np
from qwen_env.tasks import NamedTask


def accuracy(batch):
    """Whether the completion holds the letter that the row asks for."""
    right = [row["answer"] in text for row, text in zip(batch.rows, batch.completions)]
    right = np.array(right, np.float32)
    return right, {"accuracy": right}


def task(train, held_out):
    rows, others = ([{"prompt": text, "answer": "e"} for text in t] for t in (train, held_out))
    return NamedTask("letters", rows, others, accuracy, lambda text: text[:1] or None)


def letters():
    return task(["The plot was", "The songs", "It was", "A"], ["The acting", "I liked", "So"])


def harder():
    return task(["It was"], ["For a drama, I"])


def open_ended():
    """Without questions that are held out."""
    given = letters()
    return NamedTask("open", given.prompts, None, accuracy)
'''


@pytest.fixture(autouse=True)
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tasks_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("tasks_of_tests", None)


def test_what_a_task_replaces() -> None:
    """In Python: the defaults, which are the pocket task's."""
    settings = TaskConfig(task="gsm8k")
    assert (settings.prompts, settings.eval_prompts, settings.reward) == (None, None, None)
    assert settings.max_prompt_length is None
    assert TaskConfig(task="gsm8k", max_prompt_length=300).max_prompt_length == 300
    assert TaskConfig(task="gsm8k", eval_prompts="mine.jsonl").eval_prompts == "mine.jsonl"
    for given in ({"prompts": "mine.jsonl"}, {"reward": "mine:f"}):
        ((name, value),) = given.items()
        message = f"task is 'gsm8k', which brings .* but {name} is '{value}'; leave one"
        with pytest.raises(UsageError, match=message):
            TaskConfig(task="gsm8k", **given)


@pytest.mark.parametrize("name", PRESETS)
def test_a_task_on_the_command_line_replaces_the_preset_s(name: str) -> None:
    _, config = train.parse_arguments(["--preset", name, "--task", "gsm8k"])
    task = config.task
    assert task.task == "gsm8k"
    if preset(name).task.task != "gsm8k":
        assert (task.prompts, task.eval_prompts, task.reward, task.gold_reward) == (None,) * 4
        assert task.max_prompt_length is None, "it was the length of other prompts"
    assert (task.model, task.max_new_tokens) == (
        preset(name).task.model, preset(name).task.max_new_tokens,
    )  # fmt: skip
    given = ["--max-prompt-length", str(pocket.MAX_PROMPT_LENGTH), "--eval-prompts", "mine.jsonl"]
    given += ["--gold-reward", "mine:gold"]
    _, config = train.parse_arguments(["--preset", name, "--task", "gsm9k", *given])
    assert config.task.eval_prompts == "mine.jsonl" and config.task.gold_reward == "mine:gold"


@pytest.mark.parametrize("flags", [["--prompts", "a.jsonl"], ["--reward", "a:b"]])
def test_a_task_beside_prompts_or_a_reward(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=f"task is 'gsm8k'.* {flags[0][2:]} is '{flags[1]}'"):
        train.parse_arguments(["--task", "gsm8k", *flags])


def test_prompts_and_a_reward_replace_the_task_of_a_preset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = TrainConfig(task=TaskConfig(task="gsm8k", max_prompt_length=300))
    monkeypatch.setitem(PRESETS, "verified", base)
    flags = ["--preset", "verified", "--prompts", "a.jsonl", "--reward", "a:b"]
    _, config = train.parse_arguments(flags)
    assert (config.task.task, config.task.prompts, config.task.reward) == (None, "a.jsonl", "a:b")
    _, config = train.parse_arguments(["--preset", "verified", "--task", "gsm8k"])
    assert config == base, "nothing is replaced by itself"
    _, config = train.parse_arguments(["--preset", "verified", "--max-new-tokens", "9"])
    assert (config.task.task, config.task.max_prompt_length) == ("gsm8k", 300)


def test_assembled() -> None:
    settings = TaskConfig(task="tasks_of_tests:letters")
    _, task, held_out = assemble(settings)
    named = load_named_task("tasks_of_tests:letters")
    assert [dict(prompt.row) for prompt in task.prompts] == named.prompts
    assert held_out is not None
    assert [dict(prompt.row) for prompt in held_out] == named.held_out
    assert task.answer_of is not None and task.answer_of("eh") == "e"
    longest = max(len(prompt.ids) for prompt in (*task.prompts, *held_out))
    assert task.rules.max_prompt_length == longest
    # What Python gives takes the place of the task's.
    _, task, held_out = assemble(settings, prompts=["The plot"])
    assert [prompt.text for prompt in task.prompts] == ["The plot"] and held_out is None
    assert task.reward.__name__ == "accuracy"  # type: ignore[attr-defined]


def test_without_held_out_questions_some_are_set_aside() -> None:
    _, task, held_out = assemble(TaskConfig(task="tasks_of_tests:open_ended"))
    assert held_out is not None and (len(task.prompts), len(held_out)) == (3, 1)


def test_a_prompt_over_the_limit_names_the_task() -> None:
    for settings, place in (
        (TaskConfig(task="tasks_of_tests:letters", max_prompt_length=1), r"letters\[0\]"),
        (TaskConfig(task="tasks_of_tests:harder", max_prompt_length=3), r"letters .held out.\[0\]"),
    ):
        with pytest.raises(UsageError, match=f"{place} holds a prompt of .*, over the limit"):
            assemble(settings)


def test_no_prompt_is_longer_than_the_model_s_positions(inputs: Path, tmp_path: Path) -> None:
    """Known from config.json, so that an endless line is not tokenised whole."""
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "The plot was " * 200_000}))
    settings = TaskConfig(
        model=str(inputs / "model"), prompts=str(path), eval_prompts=str(path),
        max_prompt_length=None,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"line 1 of .* at least .* tokens, over the limit of 64;"):
        assemble(settings)


def test_a_prompt_may_be_as_long_as_yarn_allows(inputs: Path, tmp_path: Path) -> None:
    """The config keeps the `max_position_embeddings` of before, as Qwen's cards have it."""
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    config = json.loads((model / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    (model / "config.json").write_text(json.dumps({**config, "rope_scaling": yarn}))
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "The plot was " * 40}))
    settings = TaskConfig(
        model=str(model), prompts=str(path), eval_prompts=str(path), max_prompt_length=None
    )
    _, task, _ = assemble(settings)
    assert task.rules.max_prompt_length == len(task.prompts[0].ids) > 64
    path.write_text(json.dumps({"prompt": "The plot was " * 400}))
    with pytest.raises(UsageError, match="over the limit of 256;"):
        assemble(settings)


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.slow
def test_a_run(
    inputs: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trained, evaluated on what it held out and on another task, and not to be resumed with other
    questions."""
    words = " ".join(flags)
    for name in ("prompts", "eval-prompts", "reward"):
        words = re.sub(rf"--{name} \S+", "", words)
    run = tmp_path / "run"
    argv = ["--task", "tasks_of_tests:letters", "--output-dir", str(run), "--num-iterations", "1"]
    train.main([*words.split(), *argv])
    lines = records(run, "metrics.jsonl")
    assert all("reward/accuracy" in line for line in lines if line["iteration"])
    asked = {sample["prompt"] for sample in records(run, "samples.jsonl") if "prompt" in sample}
    assert asked <= {"The plot was", "The songs", "It was", "A", "The acting", "I liked", "So"}

    def accuracy(*words: str) -> float:
        capfd.readouterr()
        evaluate.main(["--json", "--run", str(run), *words])
        value: float = json.loads(capfd.readouterr().out)["greedy"]["accuracy"]
        return value

    assert accuracy() == pytest.approx(lines[-1]["eval/greedy/accuracy"])
    assert accuracy("--task", "tasks_of_tests:harder") in (0, 1), "that of its one question"

    (tmp_path / "tasks_of_tests.py").write_text(MODULE.replace("The songs", "Songs"))
    sys.modules.pop("tasks_of_tests")
    with pytest.raises(SystemExit):
        train.main(["--output-dir", str(run), "--resume", "--num-iterations", "4"])
    assert "tasks_of_tests:letters does not hold the prompts that" in capfd.readouterr().err
