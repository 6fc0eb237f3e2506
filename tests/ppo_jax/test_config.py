import dataclasses
import json
from typing import Any

import pytest

from ppo_jax.config import (
    PRESETS,
    OptimizerConfig,
    PPOConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    as_json,
    from_json,
    preset,
)
from qwen_env.errors import UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip(name: str) -> None:
    assert from_json(json.loads(json.dumps(as_json(PRESETS[name])))) == PRESETS[name]


def test_the_reference_algorithms_numbers() -> None:
    config = preset("qwen2.5-0.5b")
    assert config.task.model == "Qwen/Qwen2.5-0.5B"
    assert config.task.max_prompt_length + config.task.max_new_tokens == 512
    ppo, optimizer = config.ppo, config.optimizer
    assert (ppo.batch_size, ppo.num_epochs, config.run.num_prompt_epochs) == (4, 4, 3)
    assert (ppo.gamma, ppo.gae_lambda, ppo.clip_range) == (0.99, 0.95, 0.2)
    assert (ppo.value_coef, ppo.entropy_coef, ppo.target_kl) == (0.5, 0.01, 0.01)
    assert (optimizer.learning_rate, optimizer.max_grad_norm) == (1e-5, 0.5)


def test_an_unknown_preset_lists_the_others() -> None:
    with pytest.raises(UsageError, match=r"no preset 'tiny'; choose one of pocket.*qwen2\.5-0\.5b"):
        preset("tiny")


def test_no_two_fields_share_a_flag() -> None:
    groups = (TaskConfig, PPOConfig, OptimizerConfig, RunConfig)
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo": {"batch_size": 6, "num_minibatches": 4}}, "batch_size.*num_minibatches"),
        ({"ppo": {"batch_size": 0}}, "batch_size is 0; it must be at least 1"),
        ({"ppo": {"num_minibatches": 0}}, "num_minibatches is 0"),
        ({"ppo": {"num_epochs": -1}}, "num_epochs is -1"),
        ({"ppo": {"temperature": 0.0}}, "temperature is 0.0; it must be above 0"),
        ({"ppo": {"kl_coef": float("nan")}}, "kl_coef is nan"),
        ({"ppo": {"gamma": 1.01}}, "gamma is 1.01; it must lie between 0 and 1"),
        ({"ppo": {"gae_lambda": -0.1}}, "gae_lambda"),
        ({"ppo": {"clip_range": 0.0}}, "clip_range"),
        ({"ppo": {"value_clip_range": 0.0}}, "value_clip_range"),
        ({"ppo": {"target_kl": -0.01}}, "target_kl"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"optimizer": {"adam_b2": 1.0}}, "adam_b2 is 1.0; it must be at least 0 and below 1"),
        ({"optimizer": {"max_grad_norm": 0.0}}, "max_grad_norm"),
        ({"optimizer": {"max_nonfinite_updates": 0}}, "max_nonfinite_updates"),
        (
            {"optimizer": {"warmup_iterations": 5}, "run": {"num_iterations": 5}},
            "warmup_iterations.*num_iterations",
        ),
        ({"task": {"missing_eos_penalty": -1.0}}, "missing_eos_penalty"),
        ({"run": {"num_iterations": 0}}, "num_iterations"),
        ({"run": {"eval_every": 0}}, "eval_every"),
        ({"run": {"keep_checkpoints": 0}}, "keep_checkpoints"),
    ],
)
def test_values_that_cannot_be(changes: dict[str, dict[str, Any]], words: str) -> None:
    config = TrainConfig()
    groups = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in changes.items()
    }
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(config, **groups)
