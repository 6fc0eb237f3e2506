"""Runs whose critic begins as another model: `critic_model`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from ppo_jax.agent import PPOAgent
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TaskConfig, TrainConfig
from ppo_jax.models import (
    PolicyValueNetwork,
    as_reward_model,
    load_critic,
    load_pretrained,
    save_reward_model,
)
from ppo_jax.train import main
from qwen_env.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def reward_model(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ppo-reward-model leaves one: the model's backbone, and a head that is not zero."""
    folder = tmp_path_factory.mktemp("reward") / "final"
    model = as_reward_model(load_pretrained(inputs / "model"), seed=1)
    model.backbone.norm.weight[...] = model.backbone.norm.weight[...] * 1.5
    save_reward_model(model, folder, load_tokenizer(inputs / "model"))
    return folder


def config(inputs: Path, critic_model: Path, **run: Any) -> TrainConfig:
    return TrainConfig(
        TaskConfig(
            model=str(inputs / "model"),
            prompts=str(inputs / "prompts.jsonl"),
            eval_prompts=None,
            reward="rewards_of_tests:count_e",
            max_prompt_length=8,
            max_new_tokens=8,
        ),
        PPOConfig(batch_size=4, critic="separate", critic_model=str(critic_model)),
        OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        RunConfig(num_iterations=2, **run),
    )


@pytest.mark.parametrize("num_shards", [1, 2])
def test_an_agents_critic_is_the_model(
    inputs: Path, reward_model: Path, rewards: ModuleType, num_shards: int
) -> None:
    devices = {"num_devices": num_shards, "num_shards": num_shards}
    agent = PPOAgent.from_config(config(inputs, reward_model, **devices))
    found, wanted = agent.state.params, load_critic(reward_model)
    chex.assert_trees_all_equal(
        jax.device_get((found["critic"], found["value_head"])),
        jax.device_get((nnx.state(wanted.backbone), nnx.state(wanted.value_head))),
    )
    matrix = found["critic"]["layers"]["mlp"]["up_proj"]["weight"].get_value()
    assert len(matrix.sharding.device_set) == num_shards
    assert not np.array_equal(  # the policy, and so the reference, is the language model's
        found["backbone"]["norm"]["weight"].get_value(),
        found["critic"]["norm"]["weight"].get_value(),
    )
    start = agent.evaluate(agent.task.prompts[:2], greedy=True)[0]
    _, metrics = next(agent.learn())
    assert metrics["value/mean"] != 0
    assert len(start) == 2


def test_a_resumed_run_goes_on_with_it_and_saves_it(
    flags: list[str],
    reward_model: Path,
    rewards: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run's own folder will do too, for the next run."""
    monkeypatch.setattr("ppo_jax.runs.folder.RunFolder.plot", lambda self: self.path)
    whole, again = tmp_path / "whole", tmp_path / "again"
    run = tmp_path / "reward_run"
    shutil.copytree(reward_model, run / "final")
    (run / "metrics.jsonl").touch()
    shutil.copy(reward_model / "config.json", run / "config.json")
    short = [*flags, "--critic", "separate", "--critic-model", str(run), "--num-iterations", "3"]
    main([*short, "--output-dir", str(whole)])
    written = json.loads((whole / "config.json").read_text())["ppo"]
    assert written["critic_model"] == str(run / "final")

    def fail(batch: Any) -> Any:
        raise RuntimeError("no connection")

    rewards.calls, rewards.on_call = 0, {4: fail}
    with pytest.raises(SystemExit):
        main([*short, "--output-dir", str(again)])
    main(["--output-dir", str(again), "--resume"])
    file = Path("final", "critic", "model.safetensors")
    assert (again / file).read_bytes() == (whole / file).read_bytes()
    learnt = load_critic(whole / "final").backbone.norm.weight[...]
    first = load_critic(reward_model).backbone.norm.weight[...]
    assert 0 < abs(np.asarray(learnt - first)).max() < 0.5

    main([*flags, "--critic", "separate", "--critic-model", str(whole), "--num-iterations", "1",
          "--output-dir", str(tmp_path / "next")])  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "critic_model: no such folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_wrong_folders_end_in_a_sentence(
    edit: Callable[[Path], object],
    words: str,
    flags: list[str],
    reward_model: Path,
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "critic_model"
    shutil.copytree(reward_model, folder)
    edit(folder)
    assert words in _sentence(flags, folder, tmp_path, capfd)


def test_other_models_end_in_a_sentence(
    make_network: Callable[..., PolicyValueNetwork],
    inputs: Path,
    flags: list[str],
    rewards: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tokenizer = load_tokenizer(inputs / "model")
    other = as_reward_model(make_network(num_hidden_layers=2), seed=0)
    save_reward_model(other, tmp_path / "large", tokenizer)
    said = _sentence(flags, tmp_path / "large", tmp_path, capfd)
    assert "large', which does not fit: The critic's num_hidden_layers is 2" in said

    backend = load_tokenizer(inputs / "model").backend
    backend.add_special_tokens(["<|other|>"])
    model = as_reward_model(load_pretrained(inputs / "model"), seed=0)
    save_reward_model(model, tmp_path / "words", Tokenizer(backend, config={}))
    said = _sentence(flags, tmp_path / "words", tmp_path, capfd)
    assert "words', which reads other tokens than the policy writes" in said

    said = _sentence(flags, inputs / "model", tmp_path, capfd, "shared")
    assert "critic is 'shared'; set critic to 'separate'" in said


def _sentence(
    flags: list[str],
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    critic: str = "separate",
) -> str:
    capfd.readouterr()
    argv = ["--critic", critic, "--critic-model", str(folder), "--output-dir", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as exit:
        main([*flags, *argv])
    out, err = capfd.readouterr()
    assert exit.value.code == 2
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err
