"""Two devices do what one does: the same update, their own draws, nothing compiled anew."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.actor import Actor
from ppo_jax.agent import PPOAgent
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TrainConfig
from ppo_jax.data_parallel import make_mesh
from ppo_jax.sampling import Sampling
from qwen_env.errors import UsageError

TWO = RunConfig(num_devices=2)
SETTINGS = {
    "whole": PPOConfig(batch_size=8, num_epochs=2),
    "cut": PPOConfig(
        batch_size=8,
        num_epochs=2,
        num_minibatches=2,
        num_microbatches=2,
        advantage_whitening="minibatch",
        loss_aggregation="sequence",
        critic="separate",
    ),
    "packed": PPOConfig(batch_size=8, num_epochs=2, num_packed_sizes=2, top_k=40, target_kl=10.0),
}


@pytest.fixture
def make_agent(make_network, make_test_task):
    def make(ppo: PPOConfig, run: RunConfig = TWO, num_iterations: int = 4) -> PPOAgent:
        config = TrainConfig(ppo=ppo, optimizer=OptimizerConfig(learning_rate=1e-3), run=run)
        return PPOAgent(make_network(), make_test_task(), config, num_iterations)

    return make


def placed(agent: PPOAgent) -> set[int]:
    """On how many devices the arrays of the agent's state lie, each a whole copy."""
    leaves = jax.tree.leaves(agent.state)
    assert all(x.sharding.is_fully_replicated for x in leaves)
    return {len(x.devices()) for x in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_update_is_that_of_one_device(settings, make_agent):
    """What one device wrote, learnt from by one and by two."""
    one, two = make_agent(SETTINGS[settings], RunConfig()), make_agent(SETTINGS[settings])
    episodes = one.collect()
    ours, expected = two.update(episodes), one.update(episodes)
    assert placed(one) == {1} and placed(two) == {2}
    assert ours.keys() == expected.keys()
    for name in ours:
        if not name.startswith("time/"):
            np.testing.assert_allclose(
                ours[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name
            )
    for name, array in two.distributions.items():
        np.testing.assert_allclose(array, one.distributions[name], rtol=1e-4, atol=1e-5)
    # Parameters move by rounding where a gradient all but vanishes: see test_exactness.py.
    mu, expected_mu = (nnx.to_pure_dict(x.state.opt_state.mu) for x in (two, one))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected_mu))
    chex.assert_trees_all_close(
        jax.device_get(mu), jax.device_get(expected_mu), rtol=0, atol=2e-6 * scale
    )


def test_nothing_is_compiled_after_the_second_iteration(make_agent, compilations):
    ppo = dataclasses.replace(SETTINGS["packed"], batch_size=16, completions_per_prompt=2)
    agent = make_agent(ppo, num_iterations=6)
    for episodes, metrics in agent.learn():
        if metrics["iteration"] == 2:
            assert compilations
            compilations.clear()
        assert len(episodes.rollout.logprobs.devices()) == 2
        assert metrics["policy/first_ratio_max_error"] < 1e-5
        assert metrics["rollout/logprob_gap_max"] < 1e-4
    assert not compilations
    assert placed(agent) == {2}


@pytest.fixture(scope="module")
def actors(make_network, make_test_task):
    """(network's parameters, task, an actor on one device, one on two)"""
    network, task = make_network(sharpness=3.0), make_test_task(eos_token_ids=(0,))
    both = (Actor(network, task, Sampling(), mesh=make_mesh(n)) for n in (1, 2))
    return nnx.state(network), task, *both


def test_no_two_devices_draw_alike(actors):
    """The same prompt in every row: were the noise of the devices one, so were their tokens."""
    params, task, _, two = actors
    tokens = np.asarray(
        two.respond(params, [task.prompts[0]] * 8, jax.random.key(0)).rollout.state.tokens
    )
    assert len(np.unique(tokens, axis=0)) == 8


def test_greedy_responses_are_those_of_one_device(actors):
    params, task, *both = actors
    how = {"key": jax.random.key(0), "batch_size": 4, "greedy": True}
    for number in (1, 4, 5):  # the last batch is filled up to a multiple of two
        prompts = list(task.prompts)[:number]
        answers = [actor.respond_to_all(params, prompts, **how)[0] for actor in both]
        one, two = ([e.completion_ids.tolist() for e in episodes] for episodes in answers)
        assert one == two
        assert len(one) == number


def test_more_devices_than_there_are(make_agent):
    with pytest.raises(UsageError, match=r"num_devices is 3.*finds 2 here \(cpu\)"):
        make_agent(PPOConfig(batch_size=9), RunConfig(num_devices=3))
