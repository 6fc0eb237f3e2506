"""The environment under other people's wrappers, vector environments and agents."""

import gc
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.wrappers import RecordEpisodeStatistics, TransformObservation
from gymnasium.wrappers import vector as vector_wrappers

import qwen_env  # noqa: F401
from qwen_env.rewards import RewardError
from qwen_env.vector_env import QwenTextVectorEnv

DOCS = Path(__file__).parents[2] / "docs" / "environment.md"
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


def block_of_the_docs(title):
    """What the Python block under a title of "With other libraries" leaves behind."""
    _, section = DOCS.read_text().split("\n## With other libraries\n")
    (part,) = (part for part in section.split("\n### ") if part.startswith(f"{title}\n"))
    (block,) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    variables = {}
    exec(block, variables)
    return variables


def test_every_block_of_the_docs_is_run_here():
    titles = set(re.findall(r"^### (.*)$", DOCS.read_text(), re.MULTILINE))
    assert titles == set(re.findall(r'block_of_the_docs\("(.*)"\)', Path(__file__).read_text()))


def test_stable_baselines3():
    agent = block_of_the_docs("Stable-Baselines3")["agent"]
    assert agent.num_timesteps == 128
    assert all(-1 <= episode["r"] <= 1 for episode in agent.ep_info_buffer), "the sentiment"
    assert sum(episode["l"] for episode in agent.ep_info_buffer) > 64


def test_stable_baselines3_takes_one_environment_and_checks_it():
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_checker import check_env

    check_env(gym.make("QwenText-v0"), warn=False)
    env = gym.make("QwenText-v0", **SHORT)
    agent = PPO("MultiInputPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0)
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    agent.learn(64)
    after = agent.policy.parameters()
    assert any((old != new).any() for old, new in zip(before, after, strict=True))


def test_maskable_ppo():
    variables = block_of_the_docs("MaskablePPO of sb3-contrib")
    assert variables["env"].unwrapped.action_masks()[variables["action"]]


def test_maskable_ppo_is_never_refused():
    """Of 714 ids two may be chosen: an agent that does not ask would be refused at once."""
    from sb3_contrib import MaskablePPO

    env = gym.make("QwenText-v0", eos_token_ids=0, forbidden_token_ids=range(2, 714))
    agent = MaskablePPO("MultiInputPolicy", env, n_steps=64, n_epochs=1)
    agent.learn(64)
    chosen = agent.rollout_buffer.actions.flatten()
    assert set(chosen) == {0, 1}
    mask = env.unwrapped.action_masks()
    assert (mask.dtype, np.flatnonzero(mask).tolist()) == (bool, [0, 1])


def test_cleanrl():
    variables = block_of_the_docs("A loop in the style of CleanRL")
    assert len(variables["scores"]) >= 8, "64 steps, of episodes of at most 32"
    assert all(-1 <= score <= 1 for score in variables["scores"])


def test_transformers(capsys):
    variables = block_of_the_docs("A language model of transformers")
    assert variables["ended"]
    info = variables["info"]
    assert capsys.readouterr().out == f"{variables['reward']:.2f} {info['completion']}\n"
    assert len(info["completion"].split()) > 3, "it writes film reviews"


@pytest.mark.filterwarnings("ignore:`.*` is set to None:UserWarning")  # who made it, and how
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # by Minari
def test_minari_gives_an_episode_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    variables = block_of_the_docs("Data sets of Minari")
    episode, env = variables["episode"], gym.make("QwenText-v0")
    observations = [env.reset(seed=0)[0]]
    for action, reward in zip(episode.actions, episode.rewards, strict=True):
        observation, said, *flags, _ = env.step(action)
        observations.append(observation)
        assert said == reward
    assert any(flags)
    assert flags == [episode.terminations[-1], episode.truncations[-1]]
    for name, recorded in episode.observations.items():
        np.testing.assert_array_equal(recorded, [said[name] for said in observations])
    variables.clear()
    gc.collect()  # Minari's temporary folder, while its warning is ignored
