"""An agent on several devices. That their update is that of one: see learning/test_exactness.py."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.agent import PPOAgent
from ppo_jax.config import PPOConfig, RunConfig, TrainConfig
from ppo_jax.generation.actor import Actor
from ppo_jax.mesh import make_mesh, place
from ppo_jax.models import load_pretrained, save_pretrained
from ppo_jax.sampling import Sampling
from qwen_env.errors import UsageError

PPO = PPOConfig(batch_size=16, completions_per_prompt=2, num_epochs=2, num_packed_sizes=2, top_k=40)


@pytest.fixture
def make_agent(make_network, make_test_task):
    def make(ppo: PPOConfig, num_devices: int, num_shards: int = 1, **sizes: int) -> PPOAgent:
        run = RunConfig(num_devices=num_devices, num_shards=num_shards)
        config = TrainConfig(ppo=ppo, run=run)
        return PPOAgent(make_network(**sizes), make_test_task(), config, num_iterations=6)

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
    """(network's parameters, task, actors on one device, on two, on four, on 2 x 2 shards, and on
    as many with a slot each)"""
    network, task = make_network(sharpness=3.0), make_test_task(eos_token_ids=(0, *range(300, 360)))
    return (
        nnx.state(network),
        task,
        [
            Actor(network, task, Sampling(top_k=300), mesh=make_mesh(*sizes), num_slots=slots)
            for *sizes, slots in (
                (1, 1, None),
                (2, 1, None),
                (4, 1, None),
                (4, 2, None),
                (4, 2, 1),
            )
        ],
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
    params, task, (one, two, four, *_) = actors
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
    with pytest.raises(UsageError, match=r"num_devices is 9.*finds 8 here \(cpu\)"):
        make_agent(PPOConfig(batch_size=9), num_devices=9)


# ---------------------------------------------------------------- sharded parameters

WIDE = {"hidden_size": 64, "intermediate_size": 96}
LARGE = PPOConfig(batch_size=16, num_packed_sizes=2, critic="separate", ref_ema_decay=0.9)


def test_eight_shards_take_an_eighth_of_the_memory(make_agent):
    """Of parameters, moments and reference, with the small arrays that every device has."""
    one, eight = make_agent(LARGE, 1, **WIDE), make_agent(LARGE, 8, 8, **WIDE)
    assert one.state_bytes_per_device >= 7.5 * eight.state_bytes_per_device
    fullest = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves((eight.state, eight._initial_backbone)):
        for shard in array.addressable_shards:
            fullest[shard.device] += shard.data.nbytes
    assert set(fullest.values()) == {eight.state_bytes_per_device}
    chex.assert_trees_all_equal(jax.device_get(eight.state), jax.device_get(one.state))


def test_weights_are_cut_as_they_are_read(make_network, tmp_path):
    save_pretrained(make_network(tie_word_embeddings=False), tmp_path / "model")
    mesh = make_mesh(8, 4)
    cut, whole = (nnx.state(load_pretrained(tmp_path / "model", mesh=m)) for m in (mesh, None))
    chex.assert_trees_all_equal(jax.device_get(cut), jax.device_get(whole))
    expected = place(whole, mesh)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x.sharding, x) for x in (cut, expected)))
    tables = cut["backbone"]["embed_tokens"], cut["backbone"]["lm_head"]
    assert all(table[...].addressable_shards[0].data.shape[1] == 4 for table in tables)


def test_sizes_that_do_not_divide_are_named(make_agent):
    with pytest.raises(UsageError, match=r"num_shards is 3.*16 columns of .*embed_tokens"):
        make_agent(PPOConfig(batch_size=3), 3, 3)
    with pytest.raises(UsageError, match=r"num_shards is 5.*24 rows of .*mlp\.gate_proj"):
        make_agent(
            PPOConfig(batch_size=5),
            5,
            5,
            hidden_size=20,
            num_attention_heads=5,
            num_key_value_heads=5,
        )
    with pytest.raises(UsageError, match=r"num_shards \(3\) does not divide num_devices \(4\)"):
        RunConfig(num_devices=4, num_shards=3)


def test_an_action_does_not_depend_on_the_shards(make_agent):
    agents = [make_agent(LARGE, *sizes, **WIDE) for sizes in ((1, 1), (4, 2))]
    first = agents[0].task.initial_state(agents[0].task.prompts)
    observation = {
        "input_ids": first.tokens,
        "prompt_length": first.prompt_length[:, None],
        "length": first.length[:, None],
    }
    one, cut = (agent.choose_action(observation) for agent in agents)
    np.testing.assert_array_equal(cut.action, one.action)
    np.testing.assert_allclose(cut.logprob, one.logprob, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cut.value, one.value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_crosses_between_shards(make_agent):
    """Layers are gathered in scans, no weight in the decode loop, and no gradient is summed whole.

    Read from the compiled programs.
    """
    agent = make_agent(dataclasses.replace(LARGE, num_epochs=1), 8, 8, **WIDE)
    state, task, key = agent.state, agent.task, jax.random.key(0)
    first = task.initial_state([task.prompts[0]] * 16)
    arguments = (
        agent.params,
        jnp.asarray(first.tokens[:, : task.rules.max_prompt_length]),
        jnp.asarray(first.prompt_length),
        jnp.int32(0),
        key,
    )
    begin = agent.actor._begin.lower(*arguments, completions_per_prompt=1, greedy=False)
    program = Program(begin.compile().as_text())
    assert program.collectives("all-gather"), "of the layers, for the prompts and once for decode"
    assert program.decode_loops, "those that end when all rows have"
    for body in program.decode_loops:
        assert not program.collectives_within(body)

    actor = Actor(agent.network, task, Sampling(), num_slots=1, mesh=make_mesh(8, 8))
    slots = actor._begin.lower(*arguments, completions_per_prompt=1, greedy=False)
    program = Program(slots.compile().as_text())
    assert program.collectives("all-gather"), "once, for prompts and decode"
    for body in program.loops:
        assert not program.collectives_within(body), "whenever a device reads its next prompts"

    written = begin.out_info.rollout, jnp.zeros(16), None
    learn = agent._learn.lower(state, state.params["backbone"], *written, key, agent.frozen)
    program = Program(learn.compile().as_text())
    assert program.collectives("all-gather")
    smallest_matrix = 2 * 16 * 64  # the layers' key projections
    assert max(program.collectives("all-reduce")) < smallest_matrix
    assert max(program.collectives("reduce-scatter")) >= smallest_matrix / 2 / 8


class Program:
    """A compiled program: its computations by name, and the numbers that its collectives make."""

    COLLECTIVE = re.compile(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    )

    def __init__(self, text: str):
        self.computations = {}
        for block in re.split(r"\n(?=\S)", text):
            if name := re.match(r"(?:ENTRY )?%?([\w.-]+) ", block):
                self.computations[name[1]] = block
        loops = {
            re.search(r"body=%?([\w.-]+)", line)[1]: "known_trip_count" in line
            for line in text.splitlines()
            if " while(" in line
        }
        self.loops = list(loops)
        self.decode_loops = [body for body, is_counted in loops.items() if not is_counted]

    def collectives(self, kind: str, text: str | None = None) -> list[int]:
        """The number of elements of each result of a kind."""
        text = "\n".join(self.computations.values()) if text is None else text
        return [
            int(np.prod([int(size) for size in shape.split(",") if size]))
            for shapes, name, _ in self.COLLECTIVE.findall(text)
            if name == kind
            for shape in re.findall(r"\w\[([\d,]*)\]", shapes)
        ]

    def collectives_within(self, name: str) -> list[str]:
        """Of a computation and all that it calls."""
        seen, todo, found = set(), [name], []
        while todo:
            if (name := todo.pop()) in seen or name not in self.computations:
                continue
            seen.add(name)
            found += self.COLLECTIVE.findall(self.computations[name])
            todo += re.findall(r"%([\w.-]+)", self.computations[name])
        return found
