"""What settings name, put together. That flags reach it all: see test_train.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ppo_jax
from ppo_jax.agent import PPOAgent
from ppo_jax.assembly import assemble
from ppo_jax.config import PRESETS, RunConfig, TaskConfig, TrainConfig, preset
from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.rewards import RewardBatch
from qwen_env.tasks.guess_the_number import GuessTheNumber


def length(batch: RewardBatch) -> np.ndarray:
    return np.array([len(ids) for ids in batch.completion_ids], np.float32)


def test_prompts_are_set_aside_for_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "The plot" + " was" * (i % 4)}) + "\n" for i in range(25))
    )
    settings = TaskConfig(prompts=str(path), eval_prompts=None, max_prompt_length=32)
    _, task, held_out = assemble(settings, reward=length)
    assert held_out is not None
    assert [p.index for p in task.prompts] == [*range(23)]
    assert [p.index for p in held_out] == [23, 24]
    path.write_text('{"prompt": "The plot"}\n')
    with pytest.raises(UsageError, match=r"one prompt.*--eval-prompts"):
        assemble(settings, reward=length)


def test_given_prompts_and_rewards_replace_those_of_the_settings() -> None:
    prompts = ["The plot", "I found the music"]
    _, task, held_out = assemble(TaskConfig(), prompts=prompts, reward=length)
    assert [prompt.text for prompt in task.prompts] == prompts
    assert held_out is None
    assert task.reward is length


def test_a_task_keeps_its_interaction() -> None:
    """Whatever takes the place of its prompts and its reward."""
    settings = TaskConfig(task="guess_the_number?low=1&high=7")
    for given in (
        {},
        {"prompts": ["Guess"]},
        {"reward": length},
        {"prompts": ["A"], "reward": length},
    ):
        _, task, _ = assemble(settings, **given)
        assert task.rules.max_turns == 3
        assert task.partner is not None and task.partner.interaction == GuessTheNumber(1, 7)
    assert assemble(replace(settings, max_turns=5)).task.rules.max_turns == 5
    with pytest.raises(UsageError, match="guess_the_number has an interaction of its own"):
        assemble(replace(settings, interaction="mine:function"))


def test_questions_that_nobody_asks_are_not_read() -> None:
    settings = TaskConfig(task="gsm8k:no/such/folder")
    task = assemble(settings, prompts=["The plot"], reward=length).task
    assert task.partner is None and task.rules.max_turns == 1
    with pytest.raises(UsageError, match="no such file"):
        assemble(settings, prompts=["The plot"])


def test_without_a_limit_the_longest_prompt_is_the_limit(tmp_path: Path) -> None:
    """Whether it is one to train on or one to be evaluated on."""
    for name, texts in (("train", ["The plot was", "A"]), ("eval", ["The plot was not bad", "A"])):
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    train, held_out = str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")
    settings = TaskConfig(prompts=train, eval_prompts=held_out, max_prompt_length=None)
    _, task, _ = assemble(settings, reward=length)
    longest = len(task.tokenizer.encode("The plot was not bad"))
    assert task.rules.max_prompt_length == longest
    swapped = TaskConfig(prompts=held_out, eval_prompts=train, max_prompt_length=None)
    assert assemble(swapped, reward=length).task.rules.max_prompt_length == longest


def test_the_task_treats_other_prompts_alike(tmp_path: Path) -> None:
    """Those that a reset of the environment names, too."""
    settings = TaskConfig(prompt_overflow="truncate_left", max_prompt_length=2)
    _, task, _ = assemble(settings, reward=length)
    assert task.prompt_encoder.overflow == "truncate_left"
    prompt = task.prompt_from_options({"prompt": "I found the music"})
    assert prompt is not None and len(prompt.ids) == 2


def test_what_a_preset_leaves_open_must_be_given() -> None:
    """Said before anything is loaded."""
    with pytest.raises(UsageError, match=r"There are no prompts; .* --prompts"):
        assemble(preset("qwen2.5-0.5b").task, reward=length)
    with pytest.raises(UsageError, match=r"There is no reward; .* --reward"):
        assemble(preset("qwen2.5-0.5b").task, prompts=["The plot"])


def test_an_agent_from_a_preset() -> None:
    agent = PPOAgent.from_config(preset("pocket"), prompts=["The plot"], reward=length)
    assert agent.num_iterations == 60
    assert len(agent.task.prompts) == 1
    config = TrainConfig(run=RunConfig(num_iterations=None, num_prompt_epochs=128))
    agent = PPOAgent.from_config(config, prompts=["The plot", "A"], reward=length)
    assert agent.num_iterations == 4


def test_presets_name_nothing_that_only_a_checkout_has() -> None:
    """Files of theirs are the packages'; everything else is the hub's, or must be given."""
    for config in PRESETS.values():
        for name in (config.task.prompts, config.task.eval_prompts):
            assert name is None or Path(name).is_file()
        model = Path(config.task.model)
        assert model.is_dir() or (len(model.parts) == 2 and model.suffix != ".gguf")


def test_the_questions_of_presets() -> None:
    """Those that need no network; GSM8K's preset asks the questions that the package carries."""
    arithmetic = preset("arithmetic").task
    sample = f"gsm8k:{Path(ppo_jax.__file__).parent / 'data/word_problems.jsonl'}"
    gsm8k = replace(preset("gsm8k").task, task=sample, max_prompt_length=None)
    for settings, sizes in ((arithmetic, (1024, 256)), (gsm8k, (18, 2))):
        model = str(pocket.POLICY_FOLDER)
        settings = replace(settings, model=model, chat=False, system_prompt=None)
        _, task, held_out = assemble(settings)
        assert (len(task.prompts), len(held_out or ())) == sizes
        answers = [str(prompt.row["answer"]) for prompt in task.prompts]
        assert [task.answer_of(f"#### {answer}") for answer in answers] == answers
