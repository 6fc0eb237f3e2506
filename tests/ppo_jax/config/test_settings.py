import dataclasses
import json
import math
from typing import Any, get_args, get_type_hints

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
from ppo_jax.config.fields import range_of
from ppo_jax.sampling import Sampling
from qwen_env.errors import UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip(name: str) -> None:
    assert from_json(json.loads(json.dumps(as_json(PRESETS[name])))) == PRESETS[name]
    config = TrainConfig(task=TaskConfig(stop=("</answer>", "\n")))
    assert from_json(json.loads(json.dumps(as_json(config)))) == config


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


def test_every_number_has_a_range() -> None:
    for group in (TaskConfig, PPOConfig, OptimizerConfig, RunConfig):
        for name, kind in get_type_hints(group, include_extras=True).items():
            parts = {kind, *get_args(kind)} | {p for k in get_args(kind) for p in get_args(k)}
            if {int, float} & {part for part in parts if isinstance(part, type)}:
                assert range_of(kind) is not None, name


def changed(changes: dict[str, dict[str, Any]]) -> TrainConfig:
    """The default config with some fields of its groups changed."""
    config = TrainConfig()
    groups = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in changes.items()
    }
    return dataclasses.replace(config, **groups)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo": {"batch_size": 6, "num_minibatches": 4}}, "batch_size.*num_minibatches"),
        ({"ppo": {"batch_size": 0}}, "batch_size is 0; it must be at least 1"),
        ({"ppo": {"completions_per_prompt": 0}}, "completions_per_prompt is 0"),
        ({"ppo": {"num_minibatches": 0}}, "num_minibatches is 0"),
        ({"ppo": {"num_microbatches": 0}}, "num_microbatches is 0"),
        ({"ppo": {"num_packed_sizes": 0}}, "num_packed_sizes is 0"),
        ({"ppo": {"num_epochs": -1}}, "num_epochs is -1"),
        ({"ppo": {"temperature": 0.0}}, "temperature is 0.0; it must be above 0"),
        ({"ppo": {"temperature": float("nan")}}, "temperature is nan"),
        ({"ppo": {"temperature": float("inf")}}, "temperature is inf; .* and finite"),
        ({"task": {"max_new_tokens": -5}}, "max_new_tokens is -5; it must be at least 1"),
        ({"ppo": {"top_k": 0}}, "top_k is 0; it must be at least 1"),
        ({"ppo": {"top_k": 1}}, "top_k is 1, so every token is certain"),
        ({"ppo": {"top_p": 0.0}}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"ppo": {"top_p": 1.5}}, "top_p is 1.5"),
        ({"ppo": {"top_p": float("nan")}}, "top_p is nan"),
        ({"ppo": {"kl_coef": float("nan")}}, "kl_coef is nan"),
        ({"ppo": {"kl_coef": float("inf")}}, "kl_coef is inf; it must be at least 0 and finite"),
        ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate is inf; .* and finite"),
        ({"ppo": {"kl_coef": -0.1}}, "kl_coef is -0.1; it must be at least 0"),
        ({"ppo": {"kl_target": 0.0}}, "kl_target is 0.0; it must be above 0"),
        ({"ppo": {"kl_target": 6.0, "kl_horizon": 0}}, "kl_horizon is 0; it must be at least 1"),
        ({"ppo": {"ref_ema_decay": 1.0}}, "ref_ema_decay is 1.0; .* at least 0 and below 1"),
        ({"ppo": {"ref_ema_decay": -0.5}}, "ref_ema_decay is -0.5"),
        ({"ppo": {"score_clip": 0.0}}, "score_clip is 0.0; it must be above 0"),
        ({"ppo": {"gamma": 1.01}}, "gamma is 1.01; it must be between 0 and 1"),
        ({"ppo": {"gae_lambda": -0.1}}, "gae_lambda"),
        ({"ppo": {"clip_range": 0.0}}, "clip_range"),
        ({"ppo": {"clip_range_high": -0.2}}, "clip_range_high is -0.2; it must be above 0"),
        ({"ppo": {"dual_clip": 1.0}}, "dual_clip is 1.0; it must be above 1"),
        ({"ppo": {"value_clip_range": 0.0}}, "value_clip_range"),
        ({"ppo": {"value_coef": -1.0}}, "value_coef is -1.0"),
        ({"ppo": {"entropy_coef": float("nan")}}, "entropy_coef is nan"),
        ({"ppo": {"target_kl": -0.01}}, "target_kl"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"optimizer": {"learning_rate": 0.0}}, "learning_rate is 0.0; it must be above 0"),
        ({"optimizer": {"critic_learning_rate": 0.0}}, "critic_learning_rate is 0.0"),
        ({"optimizer": {"critic_learning_rate": float("inf")}}, "above 0 and finite"),
        ({"optimizer": {"adam_b1": -0.1}}, "adam_b1 is -0.1"),
        ({"optimizer": {"adam_b2": 1.0}}, "adam_b2 is 1.0; it must be at least 0 and below 1"),
        ({"optimizer": {"adam_eps": 0.0}}, "adam_eps is 0.0; it must be above 0"),
        ({"optimizer": {"adam_eps": float("inf")}}, "adam_eps is inf; it must be above 0"),
        ({"optimizer": {"weight_decay": -0.1}}, "weight_decay is -0.1"),
        ({"optimizer": {"max_grad_norm": 0.0}}, "max_grad_norm"),
        ({"optimizer": {"warmup_iterations": -1}}, "warmup_iterations is -1"),
        ({"optimizer": {"critic_warmup_iterations": -1}}, "critic_warmup_iterations is -1"),
        ({"optimizer": {"num_frozen_layers": -1}}, "num_frozen_layers is -1"),
        ({"optimizer": {"max_nonfinite_updates": 0}}, "max_nonfinite_updates"),
        ({"task": {"missing_eos_penalty": -1.0}}, "missing_eos_penalty"),
        ({"task": {"max_prompt_length": 0}}, "max_prompt_length is 0; it must be at least 1"),
        ({"task": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({"task": {"min_new_tokens": -1}}, "min_new_tokens is -1"),
        ({"run": {"seed": -1}}, r"seed is -1; it must be at least 0 and below 2\*\*32"),
        ({"run": {"seed": 2**32}}, "seed is 4294967296; it must be"),
        ({"run": {"num_devices": 0}}, "num_devices is 0"),
        ({"run": {"num_iterations": 0}}, "num_iterations"),
        ({"run": {"num_prompt_epochs": 0}}, "num_prompt_epochs"),
        ({"run": {"eval_every": 0}}, "eval_every"),
        ({"run": {"eval_size": 0}}, "eval_size"),
        ({"run": {"save_every": 0}}, "save_every"),
        ({"run": {"keep_checkpoints": 0}}, "keep_checkpoints"),
    ],
)
def test_values_that_cannot_be(changes: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        changed(changes)


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        (
            {"ppo": {"batch_size": 4, "num_minibatches": 8}},
            r"num_minibatches \(8\) is larger than batch_size \(4\)",
        ),
        (
            {"ppo": {"batch_size": 8, "num_minibatches": 4, "num_microbatches": 3}},
            r"batch_size \(8\) must be a multiple of num_minibatches x num_microbatches \(4 x 3\)",
        ),
        (
            {"ppo": {"batch_size": 8, "completions_per_prompt": 3}},
            r"batch_size \(8\) must be a multiple of completions_per_prompt \(3\)",
        ),
        (
            {"ppo": {"batch_size": 8}, "run": {"num_devices": 2, "rollout_slots": 5}},
            "rollout_slots is 5 on each of 2 devices, but a batch has only 8 responses",
        ),
        (
            {"ppo": {"batch_size": 8, "num_minibatches": 4}, "run": {"num_devices": 4}},
            r"batch_size \(8\) must be a multiple of num_minibatches x num_devices \(4 x 4\)",
        ),
        (
            {"ppo": {"batch_size": 8, "completions_per_prompt": 4}, "run": {"num_devices": 4}},
            r"must be a multiple of completions_per_prompt x num_devices \(4 x 4\)",
        ),
        (
            {"task": {"min_new_tokens": 9, "max_new_tokens": 8}},
            r"min_new_tokens \(9\) is above max_new_tokens \(8\)",
        ),
        (
            {"ppo": {"length_limit": "bootstrap", "gamma": 0.0}},
            "length_limit is 'bootstrap', but with gamma 0",
        ),
        (
            {"ppo": {"length_limit": "bootstrap"}, "task": {"missing_eos_penalty": 1.0}},
            r"missing_eos_penalty \(1.0\).*with length_limit 'bootstrap'",
        ),
        (
            {"ppo": {"target_kl_estimator": "k1"}},
            "target_kl_estimator is 'k1', but without target_kl",
        ),
        (
            {"ppo": {"target_kl_grain": "epoch"}},
            "target_kl_grain is 'epoch', but without target_kl",
        ),
        ({"ppo": {"kl_coef": 0.0, "kl_penalty": "k3"}}, "kl_penalty is 'k3', but kl_coef is 0"),
        ({"ppo": {"kl_coef": 0.0, "kl_target": 6.0}}, "kl_target is 6.0, but kl_coef is 0"),
        ({"ppo": {"kl_coef": 0.0, "ref_ema_decay": 0.9}}, "ref_ema_decay is 0.9, but kl_coef is 0"),
        ({"ppo": {"kl_horizon": 5000}}, "kl_horizon is 5000, but without kl_target"),
        # With a fifth of it, β would change its sign.
        (
            {"ppo": {"kl_target": 6.0, "kl_horizon": 10_000}, "run": {"num_iterations": 60}},
            "kl_horizon is 10000.* at most 8 % over 60 iterations.* which makes it 334",
        ),
        (
            {"ppo": {"kl_target": 6.0, "kl_horizon": 63}},
            r"kl_horizon .63. is below batch_size .64.",
        ),
        (
            {"ppo": {"value_coef": 0.0}, "optimizer": {"critic_learning_rate": 1e-4}},
            "critic_learning_rate is 0.0001, but value_coef is 0",
        ),
        (
            {"ppo": {"value_coef": 0.0}, "optimizer": {"critic_warmup_iterations": 2}},
            "critic_warmup_iterations is 2, but value_coef is 0",
        ),
        (
            {"ppo": {"value_coef": 0.0, "critic": "separate"}},
            "critic is 'separate', but value_coef is 0",
        ),
        (
            {"ppo": {"value_coef": 0.0, "value_clip_range": 0.2}},
            "value_clip_range is 0.2, but value_coef is 0",
        ),
        ({"ppo": {"value_coef": 0.0, "critic": "stopped"}}, "critic is 'stopped', but value_coef"),
        (
            {"ppo": {"value_coef": 0.0, "length_limit": "bootstrap"}},
            "length_limit is 'bootstrap', but with value_coef 0",
        ),
        (
            {"optimizer": {"warmup_iterations": 5}, "run": {"num_iterations": 5}},
            r"warmup_iterations \(5\) must be below num_iterations \(5\)",
        ),
        (
            {"optimizer": {"critic_warmup_iterations": 7}, "run": {"num_iterations": 5}},
            r"critic_warmup_iterations \(7\) must be below num_iterations \(5\)",
        ),
        (
            {
                "optimizer": {"critic_warmup_iterations": 2, "warmup_iterations": 3},
                "run": {"num_iterations": 5},
            },
            r"critic_warmup_iterations \+ warmup_iterations \(2 \+ 3\) must be below "
            r"num_iterations \(5\)",
        ),
        ({"ppo": {"critic_model": "final"}}, "critic_model is 'final', but critic is 'shared'"),
        ({"ppo": {"critic_epochs": 2}}, "critic_epochs is 2, but critic is 'shared'"),
        (
            {"optimizer": {"critic_warmup_patience": 3}},
            "critic_warmup_patience is 3, but critic_warmup_iterations is 0",
        ),
        ({"ppo": {"value_loss": "hl_gauss"}}, "value_loss is 'hl_gauss', but value_range is None"),
        ({"ppo": {"value_range": (-1.0, 1.0)}}, "value_range is .*but value_loss is 'squared'"),
        ({"ppo": {"value_bins": 11}}, "value_bins is 11, but value_loss is 'squared'"),
        (
            {"ppo": {"value_loss": "hl_gauss", "value_range": (1.0, 1.0)}},
            "value_range is 1 1; the first must be the lower",
        ),
        (
            {"ppo": {"value_loss": "hl_gauss", "value_range": (-math.inf, 1.0)}},
            "value_range.0. is -inf; it must be finite",
        ),
        (
            {"ppo": {"value_loss": "hl_gauss", "value_range": (0.0, 1.0), "value_bins": 1}},
            "value_bins is 1, so every value",
        ),
        (
            {
                "ppo": {
                    "value_loss": "hl_gauss",
                    "value_range": (0.0, 1.0),
                    "value_clip_range": 0.2,
                }
            },
            "value_clip_range is 0.2, but value_loss is 'hl_gauss'",
        ),
        (
            {"ppo": {"value_coef": 0.0, "value_loss": "hl_gauss", "value_range": (0.0, 1.0)}},
            "value_loss is 'hl_gauss', but value_coef is 0",
        ),
        ({"ppo": {"advantage": "group"}}, r"advantage is 'group'.*completions_per_prompt is 1"),
        (
            {"ppo": {"drop_equal_groups": True}},
            r"drop_equal_groups is True.*completions_per_prompt is 1",
        ),
        (
            {"ppo": {"advantage": "reinforce_plus_plus", "critic": "separate"}},
            r"critic is 'separate', but advantage is 'reinforce_plus_plus'",
        ),
        (
            {"ppo": {"advantage": "reinforce_plus_plus", "length_limit": "bootstrap"}},
            r"length_limit is 'bootstrap', but advantage is 'reinforce_plus_plus'",
        ),
        (
            {"ppo": {"advantage": "reinforce_plus_plus", "critic_gae_lambda": 1.0}},
            r"critic_gae_lambda is 1.0, but advantage",
        ),
        (
            {"ppo": {"advantage": "leave_one_out", "completions_per_prompt": 2, "gamma": 0.9}},
            r"gamma is 0.9, but advantage is 'leave_one_out'",
        ),
        (
            {"ppo": {"advantage": "group", "completions_per_prompt": 2, "kl_level": "sequence"}},
            r"kl_level is 'sequence', but advantage is 'group', which compares whole answers",
        ),
        (
            {"ppo": {"gae_lambda": 0.5, "gae_lambda_alpha": 0.1}},
            r"gae_lambda is 0.5, but gae_lambda_alpha",
        ),
        ({"ppo": {"clip_sides": "both"}}, r"clip_sides is 'both'.*old_logprobs"),
        (
            {"ppo": {"clip_sides": "both", "old_logprobs": "rollout", "dual_clip": 3.0}},
            r"dual_clip is 3.0, but clip_sides is 'both'",
        ),
        (
            {"ppo": {"importance_cap": 2.0, "old_logprobs": "rollout"}},
            r"importance_cap is 2.0.*old_logprobs",
        ),
        (
            {"ppo": {"importance_cap": 2.0, "advantage_whitening": "minibatch"}},
            r"importance_cap is 2.0.*advantage_whitening",
        ),
        (
            {
                "ppo": {"advantage": "reinforce_plus_plus"},
                "optimizer": {"critic_learning_rate": 0.001},
            },
            r"critic_learning_rate is 0.001, but advantage is 'reinforce_plus_plus'",
        ),
    ],
)
def test_contradictions_name_both_settings(changes: dict[str, dict[str, Any]], both: str) -> None:
    with pytest.raises(UsageError, match=both) as error:
        changed(changes)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo": {"length_limit": "bootstrap", "gamma": 0.5}},
        {"ppo": {"target_kl": 0.01, "target_kl_estimator": "k1", "target_kl_grain": "epoch"}},
        {"ppo": {"kl_target": 6.0, "kl_horizon": 5000, "kl_penalty": "k3", "ref_ema_decay": 0.0}},
        {"ppo": {"kl_coef": 0.0, "value_coef": 0.0}},
        {"ppo": {"batch_size": 6, "completions_per_prompt": 6, "num_minibatches": 3}},
        {"ppo": {"top_k": 2, "top_p": 1.0}},
        {
            "optimizer": {"critic_warmup_iterations": 2, "warmup_iterations": 2},
            "run": {"num_iterations": 5},
        },
        {"optimizer": {"max_grad_norm": float("inf")}},  # no clipping
        {"run": {"seed": 2**32 - 1}},
    ],
)
def test_what_makes_sense_is_allowed(changes: dict[str, dict[str, Any]]) -> None:
    assert as_json(changed(changes)) != as_json(TrainConfig())


def test_the_sampling_distribution_and_the_prompts_of_an_iteration() -> None:
    ppo = PPOConfig(batch_size=12, completions_per_prompt=4, temperature=0.7, top_k=20, top_p=0.9)
    assert ppo.sampling == Sampling(temperature=0.7, top_k=20, top_p=0.9)
    assert ppo.prompts_per_batch == 3
    assert not PPOConfig().sampling.is_truncated


def test_each_group_checks_itself() -> None:
    """Not only as a part of a whole run's settings."""
    for kind, fields in (
        (PPOConfig, {"temperature": -1.0}),
        (PPOConfig, {"batch_size": 0}),
        (PPOConfig, {"kl_penalty": "k4"}),
        (TaskConfig, {"max_new_tokens": 0}),
        (TaskConfig, {"min_new_tokens": 99}),
        (OptimizerConfig, {"learning_rate": float("nan")}),
        (OptimizerConfig, {"schedule": "slow"}),
        (RunConfig, {"dtype": "float16"}),
    ):
        with pytest.raises(UsageError, match=next(iter(fields))):
            kind(**fields)


def test_number_of_iterations() -> None:
    assert TrainConfig(run=RunConfig(num_iterations=7)).total_iterations(num_prompts=1000) == 7
    config = TrainConfig(run=RunConfig(num_iterations=None, num_prompt_epochs=3))
    assert config.ppo.batch_size == 64
    assert config.total_iterations(num_prompts=100) == 5  # 300 prompts


def test_passes_over_the_prompts_count_prompts_and_not_completions() -> None:
    for completions, expected in ((1, 3), (2, 5), (8, 20)):
        ppo = PPOConfig(batch_size=8, completions_per_prompt=completions)
        config = TrainConfig(ppo=ppo, run=RunConfig(num_prompt_epochs=2))
        assert config.total_iterations(num_prompts=10) == expected


@pytest.mark.parametrize("name", ["warmup_iterations", "critic_warmup_iterations"])
def test_a_warm_up_as_long_as_the_passes_over_the_prompts_is_refused(name: str) -> None:
    run = RunConfig(num_iterations=None, num_prompt_epochs=3)
    config = TrainConfig(run=run, optimizer=OptimizerConfig(**{name: 4}))
    assert config.total_iterations(num_prompts=100) == 5
    with pytest.raises(UsageError, match=rf"{name} \(4\) must be below num_iterations \(4\)"):
        config.total_iterations(num_prompts=80)


def test_an_adaptive_kl_coefficient_can_change_tenfold_over_a_run() -> None:
    """β is multiplied by 1 ± 0.2 batch / horizon at most, each iteration."""
    ppo = PPOConfig(batch_size=64, kl_target=2.0).for_run(200)
    assert ppo.kl_horizon is not None
    assert (1 + 0.2 * 64 / ppo.kl_horizon) ** 200 == pytest.approx(10, rel=0.02)
    assert PPOConfig(batch_size=64, kl_target=2.0).for_run(3).kl_horizon == 64
    assert PPOConfig(batch_size=64).for_run(200).kl_horizon is None
