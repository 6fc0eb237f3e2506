"""An agent on two devices. That their update is that of one: see learning/test_exactness.py."""

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
        make_agent(PPOConfig(batch_size=9), num_devices=3)
