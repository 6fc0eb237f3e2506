"""The agent with the settings that reach from the sampler to the update, all at one time."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from ppo_jax.agent import PPOAgent
from ppo_jax.algorithm import RATIO_EDGES
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TrainConfig
from ppo_jax.sampling import sampling_logits, truncation
from qwen_env import mdp

CONFIG = TrainConfig(
    ppo=PPOConfig(
        batch_size=8,
        completions_per_prompt=2,
        temperature=0.9,
        top_k=80,
        top_p=0.95,
        kl_coef=0.2,
        kl_penalty="k3",
        kl_target=0.05,
        kl_horizon=50,
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
        critic="separate",
        target_kl=10.0,
        target_kl_grain="epoch",
    ),
    optimizer=OptimizerConfig(
        learning_rate=5e-3,
        schedule="constant",
        weight_decay=0.01,
        critic_warmup_iterations=1,
        freeze_embeddings=True,
        num_frozen_layers=1,
    ),
    run=RunConfig(seed=5),
)


@pytest.fixture(scope="module")
def agent(make_network, make_test_task):
    return PPOAgent(make_network(), make_test_task(), CONFIG, num_iterations=3)


@pytest.fixture(scope="module")
def iterations(agent):
    """Of each: episodes, metrics, distributions, and copies of backbone and reference."""
    seen = []
    for episodes, metrics in agent.learn():
        backbone = jax.tree.map(np.array, agent.state.params["backbone"])
        reference = jax.tree.map(np.array, agent.reference)
        seen.append((episodes, metrics, agent.distributions, backbone, reference))
    return seen


@pytest.mark.slow
def test_three_iterations_with_all_of_them(agent, iterations):
    assert len(iterations) == agent.iteration == 3
    coefficient = CONFIG.ppo.kl_coef
    for episodes, metrics, distributions, _, _ in iterations:
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["policy/first_ratio_max_error"] < 1e-5
        assert metrics["rollout/logprob_gap_max"] < 1e-5
        assert metrics["update/nonfinite"] == metrics["update/early_stopped"] == 0
        assert metrics["objective/kl_coef"] == pytest.approx(coefficient, rel=1e-5)
        error = np.clip(metrics["objective/kl"] / CONFIG.ppo.kl_target - 1, -0.2, 0.2)
        coefficient *= 1 + error * 8 / 50
        tokens = sum(len(episode.completion_ids) for episode in episodes.episodes)
        assert distributions["ratio"].shape == (len(RATIO_EDGES) - 1,)
        assert distributions["ratio"].sum() == 2 * tokens
        assert distributions["advantage"].sum() == tokens
        assert distributions["kl_by_position"].shape == (10,)
        assert distributions["entropy_by_position"][0] > 0
    assert agent.state.controls.score_moments.number == 3 * 8
    scores = np.concatenate([episodes.scores for episodes, *_ in iterations])
    assert agent.state.controls.score_moments.std == pytest.approx(scores.std(), rel=1e-4)


@pytest.mark.slow
def test_the_reference_follows_and_the_warm_up_holds_the_policy_back(agent, iterations):
    first, second = iterations[0][3], iterations[1][3]
    chex.assert_trees_all_equal(first, jax.tree.map(np.array, agent.initial_backbone))
    assert (first["norm"]["weight"].get_value() != second["norm"]["weight"].get_value()).any()
    expected = first
    for *_, backbone, reference in iterations:
        expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, expected, backbone)
        chex.assert_trees_all_close(reference, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("greedy", [True, False])
def test_choose_action_says_the_separate_critics_value(make_network, make_test_task, greedy):
    """And the log-probability over what top-k and top-p leave."""
    agent = PPOAgent(make_network(), make_test_task(), CONFIG, num_iterations=1)
    params = agent.state.params
    moved = jax.tree.map(lambda x: x + 0.1, params["critic"])
    agent.state = agent.state._replace(params=nnx.State({**params, "critic": moved}))
    task, sampling = agent.task, CONFIG.ppo.sampling
    first = task.initial_state(task.prompts)
    observation = {
        "input_ids": first.tokens,
        "prompt_length": first.prompt_length,
        "length": first.length,
    }
    choice = agent.choose_action(observation, greedy=greedy)
    mask = np.arange(task.rules.max_length) < first.length[:, None]
    rows = np.arange(len(task.prompts))
    logits, values = (
        np.asarray(x)[rows, first.length - 1] for x in jax.jit(agent.network)(first.tokens, mask)
    )
    np.testing.assert_allclose(choice.value, values, atol=1e-5)
    logits = sampling_logits(logits, mdp.action_mask(0 * rows, task.rules, np), 0.9)
    kept = np.asarray(truncation(logits, sampling))
    assert kept[rows, choice.action].all()
    log_p = jax.nn.log_softmax(np.where(kept, logits, -np.inf))
    np.testing.assert_allclose(choice.logprob, log_p[rows, choice.action], atol=1e-5)
