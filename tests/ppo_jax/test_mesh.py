"""An agent on several devices. That their update is that of one: see learning/test_exactness.py."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from ppo_jax.agent import PPOAgent
from ppo_jax.config import PPOConfig, RunConfig, TrainConfig
from ppo_jax.generation.actor import Actor
from ppo_jax.mesh import make_mesh
from ppo_jax.sampling import Sampling
from qwen_env.errors import UsageError

PPO = PPOConfig(batch_size=16, completions_per_prompt=2, num_epochs=2, num_packed_sizes=2, top_k=40)


@pytest.fixture
def make_agent(make_network, make_test_task):
    def make(ppo: PPOConfig, num_devices: int) -> PPOAgent:
        config = TrainConfig(ppo=ppo, run=RunConfig(num_devices=num_devices))
        return PPOAgent(make_network(), make_test_task(), config, num_iterations=6)

    return make


def placed(agent: PPOAgent) -> set[int]:
    """On how many devices the arrays of the agent's state lie, each a whole copy."""
    leaves = jax.tree.leaves(agent.state)
    assert all(x.sharding.is_fully_replicated for x in leaves)
    return {len(x.devices()) for x in leaves}


@pytest.mark.slow
def test_nothing_is_compiled_after_the_second_iteration(make_agent, compilations):
    agent = make_agent(PPO, num_devices=2)
    assert placed(agent) == {2}
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
    """(network's parameters, task, actors on one device, on two, and on four)"""
    network, task = make_network(sharpness=3.0), make_test_task(eos_token_ids=(0, *range(300, 360)))
    return (
        nnx.state(network),
        task,
        [Actor(network, task, Sampling(top_k=300), mesh=make_mesh(n)) for n in (1, 2, 4)],
    )


def test_tokens_do_not_depend_on_the_number_of_devices(actors):
    params, task, all_actors = actors
    prompts = [task.prompts[i] for i in (0, 0, 1, 2)]
    one, *others = (
        actor.respond(params, prompts, jax.random.key(0), completions_per_prompt=2).rollout
        for actor in all_actors
    )
    for other in others:
        chex.assert_trees_all_equal(
            (other.state, other.sampling_mask), (one.state, one.sampling_mask)
        )
        np.testing.assert_allclose(other.logprobs, one.logprobs, rtol=0, atol=1e-5)
    assert len(np.unique(one.state.tokens, axis=0)) == 8, "no two rows draw alike"
    assert len(set(np.asarray(one.state.length).tolist())) > 2, "or it is not ragged"


def test_nor_do_those_of_any_number_of_prompts(actors):
    """Nor on the size of a batch, of which the last is filled up to a multiple of the devices."""
    params, task, (one, two, four) = actors
    expected = None
    for actor, number, batch_size in ((one, 5, 4), (one, 5, 3), (two, 5, 3), (four, 1, 3)):
        prompts = list(task.prompts)[:number]
        episodes, _ = actor.respond_to_all(
            params, prompts, jax.random.key(0), batch_size=batch_size
        )
        answers = [episode.completion_ids.tolist() for episode in episodes]
        expected = expected or answers
        assert answers == expected[:number]


def test_more_devices_than_there_are(make_agent):
    with pytest.raises(UsageError, match=r"num_devices is 5.*finds 4 here \(cpu\)"):
        make_agent(PPOConfig(batch_size=10), num_devices=5)
