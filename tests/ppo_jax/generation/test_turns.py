"""Compiled rollouts of several turns: against teacher forcing, and through the environments."""

import json
import warnings
from dataclasses import replace

import gymnasium as gym
import jax
import numpy as np
import pytest
from flax import nnx

import qwen_env  # noqa: F401  (registers QwenText-v0)
from ppo_jax.agent import PPOAgent, _turn_start
from ppo_jax.config import PPOConfig, TrainConfig
from ppo_jax.generation.actor import Actor
from ppo_jax.generation.episode_metrics import sample_record
from ppo_jax.generation.slots import Writer
from ppo_jax.learning.response_outputs import response_outputs
from ppo_jax.mesh import make_mesh
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.interaction import Reply, TurnBatch
from qwen_env.rewards import RewardBatch

T = 48
ENDINGS = (0, *range(260, 420))


def chatty(batch: TurnBatch) -> list[Reply]:
    """Of a length that the seed and the number of the turn choose; often beyond one chunk."""
    replies = []
    for turn in batch:
        rng = np.random.default_rng((turn.seed, turn.number))
        ids = rng.integers(0, 714, rng.choice([1, 3, 34], p=[0.4, 0.3, 0.3]))
        replies.append(
            Reply(ids=ids, reward=turn.number / 8, done=rng.random() < 0.1, state=turn.number)
        )
    return replies


def count_e(batch: RewardBatch) -> np.ndarray:
    return np.array([text.count("e") for text in batch.completions], np.float32)


ARGUMENTS = {
    "prompts": ["The plot", "It was", "All in all, the songs", "A", "My friend and I"],
    "reward": count_e,
    "max_prompt_length": 8,
    "max_new_tokens": T,
    "eos_token_ids": ENDINGS,
    "min_new_tokens": 2,
    "interaction": chatty,
    "max_turns": 4,
}


@pytest.fixture(scope="module")
def network(make_network):
    return make_network()


@pytest.fixture(scope="module")
def experience(network, make_test_task):
    task = make_test_task(**ARGUMENTS)
    actor = Actor(network, task, Sampling(0.8, top_k=300))
    return task, respond(actor, network, task)


def respond(actor, network, task):
    params = nnx.state(network)
    prompts = list(task.prompts)[:4]
    return actor.respond(params, prompts, jax.random.key(1), completions_per_prompt=5)


def test_decoding_through_the_caches_equals_the_full_forward_pass(network, experience):
    task, done = experience
    state = done.rollout.state
    own = mdp.response_mask(jax.device_get(state), T, np)
    outputs = jax.jit(response_outputs, static_argnames=("rules", "sampling"))(
        network,
        state.tokens,
        state.prompt_length,
        state.length,
        done.rollout.sampling_mask,
        own,
        rules=task.rules,
        sampling=Sampling(0.8),
    )
    logprobs = np.asarray(done.rollout.logprobs)
    np.testing.assert_allclose(logprobs[own], np.asarray(outputs.logprobs)[own], atol=1e-5)
    assert not logprobs[~own].any()
    assert (logprobs[own] < 0).all()
    assert (np.asarray(done.rollout.sampling_mask)[~own] == 255).all()


def test_it_is_ragged(experience):
    _, done = experience
    state = jax.device_get(done.rollout.state)
    assert set(state.num_turns.tolist()) >= {1, 2, 3, 4}
    assert mdp.has_ended(state).all()
    reasons = {episode.finish_reason for episode in done.episodes}
    assert reasons == {"eos", "done", "length", "overflow"}
    replies = mdp.response_length(state) - state.own.sum(-1)
    assert replies.max() > 33, "or no reply is read in two parts"


def test_rewards_are_those_of_turns_and_of_the_end(experience):
    _, done = experience
    rewards = done.rewards
    np.testing.assert_allclose(rewards.sum(-1), done.scores, rtol=1e-6)
    for row, episode, outcome in zip(rewards, done.episodes, done.outcomes, strict=True):
        expected = np.zeros(T, np.float32)
        for number, (_, end) in enumerate(episode.turns, start=1):
            if number <= len(episode.conversation.turn_rewards):
                expected[end - 1] += number / 8
        expected[len(episode.response_ids) - 1] += outcome.info["reward_components"]["score"]
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_a_sample_has_the_whole_conversation(experience):
    """What the reward function was told of it, replies in their places."""
    _, done = experience
    for episode, outcome in zip(done.episodes, done.outcomes, strict=True):
        messages = sample_record(episode, outcome)["messages"]
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert "\n".join(said) == outcome.info["completion"]
        assert messages[0] == {"role": "user", "content": episode.prompt.text}
        assert json.loads(json.dumps(messages)) == messages
        roles = "".join(message["role"][0] for message in messages)
        assert roles == "ua" * len(said), "a reply's ids are a user's message"


@pytest.mark.parametrize(
    ("settings", "warns"),
    [({}, True), ({"missing_eos_penalty": 1.0}, False), ({"length_limit": "bootstrap"}, False)],
)
def test_turns_that_cost_something_where_endless_ones_are_free(
    network, make_test_task, experience, settings, warns, monkeypatch
):
    _, done = experience
    costs = [replace(outcome, turn_rewards=[(3, -0.5)]) for outcome in done.outcomes]
    limit = settings.pop("length_limit", "score")
    task = make_test_task(**ARGUMENTS, **settings)
    config = TrainConfig(ppo=PPOConfig(batch_size=4, num_minibatches=1, length_limit=limit))
    agent = PPOAgent(network, task, config, num_iterations=1)
    for outcomes, expected in ((costs, warns), (done.outcomes, False)):
        written = replace(done, outcomes=outcomes)
        monkeypatch.setattr(agent.actor, "respond", lambda *_, written=written, **__: written)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            agent.collect()
        said = [str(warning.message) for warning in caught]
        assert len(said) == expected
        assert all("A turn earned less than 0, and a turn that never ends" in x for x in said)


def assert_it_writes_the_same(network, experience, **settings):
    task, done = experience
    other = respond(Actor(network, task, Sampling(0.8, top_k=300), **settings), network, task)
    for name, mine, theirs in zip(
        mdp.State._fields, done.rollout.state, other.rollout.state, strict=True
    ):
        assert (mine is None) or np.array_equal(mine, theirs), name
    np.testing.assert_allclose(done.rollout.logprobs, other.rollout.logprobs, atol=1e-5)
    np.testing.assert_array_equal(done.rollout.sampling_mask, other.rollout.sampling_mask)


def test_in_fewer_rows_and_on_several_devices_it_writes_the_same(network, experience):
    assert_it_writes_the_same(network, experience, compacts_rows=True)
    assert_it_writes_the_same(network, experience, mesh=make_mesh(2))


def test_reading_no_more_slots_than_are_in_use_it_writes_the_same(network, experience, monkeypatch):
    monkeypatch.setattr(Writer, "_reads", lambda *_: [16, 24, 56])
    assert_it_writes_the_same(network, experience)


def test_nothing_is_compiled_the_second_time(network, experience, make_test_task, compilations):
    task, _ = experience
    actor = Actor(network, task, Sampling(0.8, top_k=300))
    respond(actor, network, task)
    compilations.clear()
    done = actor.respond(
        nnx.state(network), list(task.prompts)[:4], jax.random.key(7), completions_per_prompt=5
    )
    assert not compilations
    assert len({len(episode.response_ids) for episode in done.episodes}) > 5


def test_the_environments_replay_it(experience):
    _, done = experience
    state = jax.device_get(done.rollout.state)
    env = gym.make("QwenText-v0", **ARGUMENTS).unwrapped
    count = len(done.episodes)
    envs = gym.make_vec("QwenText-v0", num_envs=count, autoreset_mode="Disabled", **ARGUMENTS)
    envs.reset()
    starts = []
    for i, episode in enumerate(done.episodes):
        options = {
            "prompt_index": episode.prompt.index,
            "episode_seed": episode.conversation.seed,
        }
        starts.append(options)
        envs.reset(options=options | {"reset_mask": np.arange(count) == i})
    total = np.zeros(count)
    for row, (episode, outcome) in enumerate(zip(done.episodes, done.outcomes, strict=True)):
        env.reset(options=starts[row])
        paid = []
        for action in episode.completion_ids.tolist():
            observation, reward, *flags, info = env.step(action)
            paid.append(reward)
        np.testing.assert_array_equal(observation["input_ids"], state.tokens[row])
        np.testing.assert_array_equal(observation["response_mask"], state.own[row])
        assert flags == [state.terminated[row], state.truncated[row]]
        assert {name: info[name] for name in outcome.info} == outcome.info
        np.testing.assert_allclose(paid, done.rewards[row][own_of(state, row)], rtol=1e-6)
        total[row] = sum(paid)
    np.testing.assert_allclose(total, done.scores, rtol=1e-6)
    # Together: rows that have ended would be refused, so each runs until the first one ends.
    shortest = min(len(episode.completion_ids) for episode in done.episodes)
    for step in range(shortest):
        actions = np.array([episode.completion_ids[step] for episode in done.episodes])
        said, *_ = envs.step(actions)
    for row in range(count):
        length = said["length"][row].item()
        np.testing.assert_array_equal(said["input_ids"][row, :length], state.tokens[row, :length])
        assert said["response_mask"][row].sum() == shortest


def own_of(state, row):
    return mdp.response_mask(mdp.at(state, row), T, np)


def test_where_a_turn_began_is_seen_in_an_observation(make_test_task):
    env = gym.make("QwenText-v0", **ARGUMENTS | {"min_new_tokens": 1}).unwrapped
    observation, _ = env.reset(options={"prompt_index": 0, "episode_seed": 1})
    starts = []
    for action in (5, ENDINGS[0], 5, ENDINGS[0], 5):
        starts.append(_turn_start(observation).item() == mdp.turn_start(env._state))
        observation, *_ = env.step(action)
    assert all(starts) and mdp.turns_ended(env._state) == 2
