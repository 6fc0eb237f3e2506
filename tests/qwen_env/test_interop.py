"""The environment under other people's wrappers, vector environments and agents."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics, TransformObservation
from gymnasium.wrappers import vector as vector_wrappers

import qwen_env  # noqa: F401
from qwen_env.rewards import RewardError
from qwen_env.vector_env import QwenTextVectorEnv

SHORT = {"max_new_tokens": 4, "eos_token_ids": list(range(50))}


def length_reward(batch):
    return np.array([len(ids) for ids in batch.completion_ids], np.float32)


def test_record_episode_statistics():
    env = RecordEpisodeStatistics(gym.make("QwenText-v0", reward=length_reward, **SHORT))
    env.reset(seed=0)
    env.step(100)
    *_, info = env.step(0)
    assert (info["episode"]["r"], info["episode"]["l"]) == (2.0, 2)

    vector = gym.make_vec("QwenText-v0", num_envs=3, reward=length_reward, **SHORT)
    vector = vector_wrappers.RecordEpisodeStatistics(vector)
    vector.reset(seed=0)
    for _ in range(4):
        *_, infos = vector.step(np.full(3, 100))
    assert infos["episode"]["r"].tolist() == [4.0] * 3
    assert infos["episode"]["l"].tolist() == [4] * 3


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_vector_wrappers_see_what_they_see_of_sync_vector_env(mode):
    ours = gym.make_vec("QwenText-v0", num_envs=3, autoreset_mode=mode, **SHORT)
    sync = gym.make_vec(
        "QwenText-v0", num_envs=3, vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode}, **SHORT,
    )  # fmt: skip
    ours, sync = (vector_wrappers.RecordEpisodeStatistics(envs) for envs in (ours, sync))
    for envs in (ours, sync):
        envs.reset(seed=0)
    num_ended = 0
    for actions in np.random.default_rng(0).integers(0, 300, (40, 3)):
        *_, infos = ours.step(actions)
        *_, expected = sync.step(actions)
        for said in (infos, expected):  # the time is the clock's
            said.get("episode", {}).pop("t", None)
        assert data_equivalence(infos, expected, exact=True)
        num_ended += "episode" in infos
    assert num_ended > 10


def test_transform_observation():
    env = gym.make("QwenText-v0", **SHORT)
    space = env.observation_space["input_ids"]
    env = TransformObservation(env, lambda observation: observation["input_ids"], space)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    observation, *_ = env.step(100)
    assert 100 in observation


def test_async_vector_env_with_spawned_workers():
    ours = gym.make_vec("QwenText-v0", num_envs=2, **SHORT)
    spawned = gym.make_vec(
        "QwenText-v0", num_envs=2, vectorization_mode="async",
        vector_kwargs={"context": "spawn"}, **SHORT,
    )  # fmt: skip
    try:
        assert data_equivalence(ours.reset(seed=5), spawned.reset(seed=5), exact=True)
        for actions in np.random.default_rng(0).integers(0, 300, (12, 2)):
            assert data_equivalence(ours.step(actions), spawned.step(actions), exact=True)
    finally:
        spawned.close()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium logs the worker's traceback
def test_a_reward_that_fails_in_a_spawned_worker():
    envs = gym.make_vec(
        "QwenText-v0", num_envs=2, vectorization_mode="async",
        vector_kwargs={"context": "spawn"}, max_new_tokens=1,
        reward=lambda batch: [float("nan")],  # cloudpickle takes it there
    )  # fmt: skip
    try:
        envs.reset(seed=0)
        with pytest.raises(RewardError, match=r"<lambda> returned nan for row 0"):
            envs.step(np.array([100, 100]))
    finally:
        envs.close(terminate=True)


def test_dict_info_to_list():
    env = vector_wrappers.DictInfoToList(gym.make_vec("QwenText-v0", num_envs=2, **SHORT))
    assert isinstance(env.unwrapped, QwenTextVectorEnv)
    env.reset(seed=0)
    *_, infos = env.step(np.array([0, 100]))
    assert infos[0]["finish_reason"] == "eos"
    assert infos[1] == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stable_baselines3_trains_on_the_pocket_task():
    from stable_baselines3 import PPO

    env = FlattenObservation(gym.make("QwenText-v0"))
    agent = PPO("MlpPolicy", env, n_steps=128, batch_size=64, n_epochs=1, seed=0)
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    agent.learn(384)
    after = agent.policy.parameters()
    assert any((old != new).any() for old, new in zip(before, after, strict=True))
    returns = [episode["r"] for episode in agent.ep_info_buffer]
    assert len(returns) >= 384 // 32
    assert all(-1 <= value <= 1 for value in returns), "the grammar's sentiment"
    observation, _ = env.reset(seed=1)
    action, _ = agent.predict(observation)
    env.step(action)
