"""Whole runs against the same in PyTorch and float64: with all settings at one time, and with
random ones, of which RANDOM_RUNS=100 in the environment compares so many.
"""

import math
import os
import random

import pytest
from torch_ppo import TorchPPO, as_tensors, parameters_in

from ppo_jax.agent import _SHUFFLE, PPOAgent
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TrainConfig
from ppo_jax.models import save_pretrained

NUM_RANDOM_RUNS = int(os.environ.get("RANDOM_RUNS", 2))
NUM_ITERATIONS = 3
BATCH_SIZE = 16


ALL_AT_ONCE = TrainConfig(
    ppo=PPOConfig(
        batch_size=BATCH_SIZE,
        completions_per_prompt=2,
        temperature=0.9,
        top_k=80,
        top_p=0.95,
        kl_coef=0.2,
        kl_penalty="k3",
        kl_target=0.05,
        kl_horizon=40,
        ref_ema_decay=0.5,
        scale_scores=True,
        score_clip=3.0,
        whiten_rewards=True,
        length_limit="bootstrap",
        advantage_whitening="minibatch",
        num_epochs=2,
        num_minibatches=2,
        num_microbatches=2,
        loss_aggregation="sequence",
        clip_range_high=0.3,
        dual_clip=3.0,
        value_clip_range=0.5,
        entropy_coef=0.01,
        critic="separate",
        target_kl=10.0,
        target_kl_grain="epoch",
    ),
    optimizer=OptimizerConfig(
        learning_rate=5e-3,
        schedule="cosine",
        adam_eps=1e-4,
        weight_decay=0.01,
        critic_warmup_iterations=1,
        freeze_embeddings=True,
        num_frozen_layers=1,
    ),
    run=RunConfig(seed=5),
)


def random_config(rng: random.Random) -> TrainConfig:
    """Settings that all change what is computed, each with its default among them."""
    one_of = rng.choice
    kl_coef, value_coef = one_of([0.1, 0.1, 0.5, 0.0]), one_of([0.1, 0.5, 0.5, 1.0, 0.0])
    target_kl, kl_target = one_of([None, 1e-3, 1e-2]), one_of([None, 0.05])
    ppo = {
        "completions_per_prompt": one_of([1, 2, 4]),
        "temperature": one_of([1.0, 0.7, 1.4]),
        "top_k": one_of([None, None, 50]),
        "top_p": one_of([None, None, 0.9]),
        "kl_coef": kl_coef,
        "scale_scores": one_of([False, True]),
        "score_clip": one_of([None, 0.8]),
        "whiten_rewards": one_of([False, True]),
        "length_limit": one_of(["score", "bootstrap"]) if value_coef else "score",
        "gamma": one_of([1.0, 0.97, 0.5]),
        "gae_lambda": one_of([0.95, 0.0, 1.0]),
        "advantage_whitening": one_of(["batch", "minibatch", "none"]),
        "num_epochs": one_of([1, 2, 3]),
        "num_minibatches": one_of([1, 2, 4]),
        "num_microbatches": one_of([1, 2]),
        "num_packed_sizes": one_of([1, 2, 4]),
        "loss_aggregation": one_of(["token", "sequence"]),
        "clip_range": one_of([0.2, 0.02]),
        "clip_range_high": one_of([None, 0.3, 0.01]),
        "dual_clip": one_of([None, 1.05, 3.0]),
        "value_coef": value_coef,
        "entropy_coef": one_of([0.0, 0.01]),
        "target_kl": target_kl,
    }
    optimizer = {
        "learning_rate": one_of([1e-3, 5e-3]),
        "schedule": one_of(["constant", "linear", "cosine"]),
        "warmup_iterations": one_of([0, 1]),
        "adam_b1": one_of([0.9, 0.0]),
        "adam_b2": one_of([0.999, 0.9]),
        "adam_eps": 1e-4,  # a smaller one would make steps of gradients that are mere rounding
        "weight_decay": one_of([0.0, 0.1]),
        "max_grad_norm": one_of([1.0, 0.05, math.inf]),
        "freeze_embeddings": one_of([False, False, True]),
        "num_frozen_layers": one_of([0, 0, 1, 2]),
    }
    if kl_coef:
        ppo |= {
            "kl_penalty": one_of(["k1", "k2", "k3"]),
            "ref_ema_decay": one_of([None, 0.0, 0.5]),
        }
    if kl_coef and kl_target:
        ppo |= {"kl_target": kl_target, "kl_horizon": one_of([20, 40])}
    if target_kl:
        ppo |= {
            "target_kl_estimator": one_of(["k1", "k2", "k3", "reference"]),
            "target_kl_grain": one_of(["minibatch", "epoch"]),
        }
    if value_coef:
        ppo |= {
            "critic": one_of(["shared", "stopped", "separate"]),
            "value_clip_range": one_of([None, 0.01, 0.2]),
        }
        optimizer |= {
            "critic_warmup_iterations": one_of([0, 0, 1]),
            "critic_learning_rate": one_of([None, 2e-3]),
        }
    run = {
        "seed": rng.randrange(2**32),
        "num_devices": one_of([1, 1, 2]),
        "remat": one_of([False, False, True]),
    }
    return TrainConfig(
        ppo=PPOConfig(batch_size=BATCH_SIZE, **ppo),
        optimizer=OptimizerConfig(**optimizer),
        run=RunConfig(**run),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["all at once", *range(NUM_RANDOM_RUNS)])
def test_a_run_equals_one_in_pytorch(seed, make_network, make_test_task, minibatches, tmp_path):
    rng, is_random = random.Random(seed), seed != "all at once"
    config = random_config(rng) if is_random else ALL_AT_ONCE
    network = make_network(
        seed if is_random else 0,
        num_key_value_heads=rng.choice([1, 2, 4]),
        tie_word_embeddings=rng.random() < 0.5,
    )
    task = make_test_task(min_new_tokens=rng.choice([0, 0, 3]))
    agent = PPOAgent(network, task, config, NUM_ITERATIONS)
    save_pretrained(network, tmp_path / "start")
    theirs = TorchPPO(tmp_path / "start", task.rules, config.ppo, config.optimizer, NUM_ITERATIONS)
    for iteration in range(NUM_ITERATIONS):
        episodes, rows = agent.collect(), minibatches(agent._key(_SHUFFLE), config.ppo)
        metrics = agent.update(episodes)
        rollout = episodes.rollout
        tensors = as_tensors(rollout.state, rollout.sampling_mask, task.rules.vocab_size)
        expected = theirs.iteration(tensors, episodes.scores, rows)
        if theirs.stop_margin < 1e-5:
            pytest.skip("the early stop hangs on rounding")
        # What an iteration rounds is in the parameters of the next.
        rounding = 1 + 5 * iteration
        for name, value in expected.items():
            tolerance = 3e-5 + 1e-4 * rounding * abs(value)
            ours = pytest.approx(value, abs=tolerance, nan_ok=True)
            assert metrics[name] == ours, (iteration, name)
        save_pretrained(agent.network, tmp_path / "now")
        parameters = parameters_in(tmp_path / "now")
        assert parameters.keys() == theirs.parameters.keys()
        for name, x in parameters.items():
            difference = (x.double() - theirs.parameters[name]).abs().max().item()
            assert difference < 3e-5 * rounding, (iteration, name)
        assert metrics["policy/first_ratio_max_error"] < 1e-5
        assert metrics["rollout/logprob_gap_max"] < 2e-5
        num_tokens = sum(len(episode.completion_ids) for episode in episodes.episodes)
        assert agent.distributions["advantage"].sum() == num_tokens
        if not metrics["update/early_stopped"]:
            num_epochs = metrics["update/epochs"]
            assert agent.distributions["ratio"].sum() == num_epochs * num_tokens
    assert float(agent.state.controls.kl_coef) == pytest.approx(theirs.kl_coef, rel=1e-4)
