import copy
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode

import qwen_env  # noqa: F401
from qwen_env.errors import UsageError
from qwen_env.rewards import RewardError
from qwen_env.vector_env import QwenTextVectorEnv

N = 5
# Short episodes that end in both ways: a tenth of the vocabulary ends them.
SHORT = {"max_new_tokens": 4, "eos_token_ids": list(range(50)), "missing_eos_penalty": 0.5}


def make_ours(**arguments):
    return gym.make_vec("QwenText-v0", num_envs=N, **(SHORT | arguments))


def random_actions(env, steps=60):
    return np.random.default_rng(0).integers(0, env.single_action_space.n, (steps, N))


@pytest.mark.parametrize("prompt_order", ["uniform", "shuffle", "sequential"])
@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_it_says_exactly_what_sync_vector_env_says(mode, prompt_order):
    ours = make_ours(autoreset_mode=mode, prompt_order=prompt_order)
    sync = gym.make_vec(
        "QwenText-v0", num_envs=N, vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode}, prompt_order=prompt_order, **SHORT,
    )  # fmt: skip
    assert type(ours.unwrapped) is QwenTextVectorEnv
    assert ours.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    for name in ("observation_space", "action_space"):
        assert getattr(ours, name) == getattr(sync, name)
        assert getattr(ours, f"single_{name}") == getattr(sync, f"single_{name}")

    assert data_equivalence(ours.reset(seed=3), sync.reset(seed=3), exact=True)
    assert ours.np_random_seed == sync.np_random_seed == tuple(range(3, 3 + N))
    num_ended = 0
    for actions in random_actions(ours):
        said = ours.step(actions)
        assert data_equivalence(said, sync.step(actions), exact=True)
        assert said[0] in ours.observation_space
        ended = said[2] | said[3]
        num_ended += ended.sum()
        if mode == "Disabled" and ended.any():
            resets = (env.reset(options={"reset_mask": ended.copy()}) for env in (ours, sync))
            assert data_equivalence(*resets, exact=True)
    assert num_ended > 5 * N
    seeds = [9, None, 9, 4, None]
    for name in ("input_ids", "length"):
        np.testing.assert_array_equal(*(env.reset(seed=seeds)[0][name] for env in (ours, sync)))


def test_row_i_is_the_single_environment_of_seed_s_plus_i():
    vector = make_ours(autoreset_mode="SameStep")
    singles = [gym.make("QwenText-v0", **SHORT) for _ in range(N)]
    observations, _ = vector.reset(seed=11)
    for i, single in enumerate(singles):
        observation, _ = single.reset(seed=11 + i)
        np.testing.assert_array_equal(observations["input_ids"][i], observation["input_ids"])
    for actions in random_actions(vector):
        observations, rewards, terminations, truncations, infos = vector.step(actions)
        for i, single in enumerate(singles):
            observation, reward, terminated, truncated, info = single.step(actions[i])
            assert (rewards[i], terminations[i], truncations[i]) == (reward, terminated, truncated)
            if terminated or truncated:
                assert data_equivalence(infos["final_obs"][i], observation, exact=True)
                assert infos["final_info"]["completion"][i] == info["completion"]
                observation, info = single.reset()
                assert infos["prompt"][i] == info["prompt"]
            np.testing.assert_array_equal(observations["input_ids"][i], observation["input_ids"])


def test_next_step_spends_a_step_on_the_reset():
    env = make_ours()
    env.reset(seed=0)
    allowed = np.full(N, 100)
    ends = np.where(np.arange(N) == 2, 0, allowed)
    observations, rewards, terminations, truncations, infos = env.step(ends)
    assert terminations.tolist() == [False, False, True, False, False]
    assert infos["_completion"].tolist() == terminations.tolist()
    assert infos["finish_reason"][2] == "eos"
    assert "prompt" not in infos

    observations, rewards, terminations, truncations, infos = env.step(ends)
    assert not (terminations | truncations).any()
    assert not rewards.any()
    assert infos["_prompt"].tolist() == [False, False, True, False, False]
    assert observations["length"][2] == observations["prompt_length"][2]
    written = (observations["length"] - observations["prompt_length"])[:, 0]
    assert written.tolist() == [2, 2, 0, 2, 2]


def test_same_step_resets_within_the_step_that_ends_it():
    env = make_ours(autoreset_mode="SameStep")
    env.reset(seed=0)
    ends = np.where(np.arange(N) == 2, 0, 100)
    observations, rewards, terminations, _, infos = env.step(ends)
    is_row_2 = [False, False, True, False, False]
    assert terminations.tolist() == is_row_2
    written = (observations["length"] - observations["prompt_length"])[:, 0]
    assert written.tolist() == [1, 1, 0, 1, 1], "row 2 has begun anew"
    for name in ("final_obs", "final_info", "prompt"):
        assert infos[f"_{name}"].tolist() == is_row_2
    final = infos["final_obs"][2]
    assert final in env.single_observation_space
    assert final["length"] == final["prompt_length"] + 1
    assert infos["final_obs"][0] is None
    assert infos["final_info"]["finish_reason"][2] == "eos"
    assert infos["final_info"]["_finish_reason"].tolist() == is_row_2
    assert infos["final_info"]["reward_components"]["score"][2] == rewards[2]


def test_disabled_waits_for_a_reset_that_leaves_the_others_alone():
    env = make_ours(autoreset_mode="Disabled")
    env.reset(seed=0)
    before, *_ = env.step(np.where(np.arange(N) == 2, 0, 100))
    mask = np.arange(N) == 2
    observations, infos = env.reset(options={"reset_mask": mask})
    assert infos["_prompt"].tolist() == mask.tolist()
    for name, array in observations.items():
        np.testing.assert_array_equal(array[~mask], before[name][~mask])
    assert observations["length"][2] == observations["prompt_length"][2]
    _, _, terminations, truncations, _ = env.step([100] * N)
    assert not (terminations | truncations).any()


def test_a_seed_with_a_mask_seeds_the_rows_that_are_reset():
    env, twin = make_ours(), make_ours()
    for e in (env, twin):
        e.reset(seed=0)
    mask = np.arange(N) == 2
    env.reset(seed=50, options={"reset_mask": mask})
    _, infos = env.reset()
    _, untouched = twin.reset()
    assert (infos["prompt_index"] == untouched["prompt_index"])[~mask].all()
    assert env.np_random_seed == (0, 1, 52, 3, 4)


@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_a_step_whose_reward_fails_is_not_taken(mode):
    def reward(batch):
        if fails:
            raise ConnectionError("no judge today")
        return np.ones(len(batch), np.float32)

    env, twin = (make_ours(autoreset_mode=mode, reward=reward) for _ in range(2))
    for e in (env, twin):
        e.reset(seed=0)
    actions = np.where(np.arange(N) == 2, 0, 100)
    fails = True
    with pytest.raises(
        RewardError, match=r"no judge today \(.*, line \d+\), for row 0 \(prompt 'On the big"
    ):
        env.step(actions)
    fails = False
    for _ in range(1 if mode == "Disabled" else 6):
        assert data_equivalence(env.step(actions), twin.step(actions), exact=True)


def test_rows_that_end_together_are_scored_together():
    sizes = []

    def reward(batch):
        sizes.append(len(batch))
        return np.arange(len(batch), dtype=np.float32)

    env = make_ours(reward=reward, missing_eos_penalty=0.0, max_new_tokens=2)
    env.reset(seed=0)
    _, rewards, *_ = env.step(np.array([100, 0, 100, 0, 100]))
    assert sizes == [2]
    assert rewards.tolist() == [0, 0, 0, 1, 0]
    _, rewards, *_ = env.step(np.full(N, 100))
    assert sizes == [2, 3]
    assert rewards.tolist() == [0, 0, 1, 0, 2]


def test_the_caller_may_scribble_on_what_is_returned():
    env, twin = make_ours(), make_ours()
    env.reset(seed=0)
    twin.reset(seed=0)
    for actions in random_actions(env, 20):
        said = env.step(actions)
        assert data_equivalence(said, twin.step(actions), exact=True)
        for array in (*said[0].values(), *said[1:4]):
            array[...] = 1


def test_options_name_the_prompt_of_every_row():
    env = make_ours()
    observations, infos = env.reset(options={"prompt_index": 4})
    assert infos["prompt_index"].tolist() == [4] * N
    assert (observations["input_ids"] == observations["input_ids"][0]).all()
    mask = np.arange(N) < 2
    options = {"prompt": "The plot", "reset_mask": mask}
    _, infos = env.reset(options=options)
    assert infos["prompt"].tolist() == ["The plot"] * 2 + [None] * 3
    assert infos["_prompt"].tolist() == mask.tolist()
    assert options.keys() == {"prompt", "reset_mask"}


def test_action_mask():
    env = make_ours(min_new_tokens=1, forbidden_token_ids=[60])
    env.reset(seed=0)
    env.action_space.seed(0)
    mask = env.action_mask()
    assert (mask.dtype, mask.shape) == (np.int8, (N, env.single_action_space.n))
    assert (np.flatnonzero(mask[0] == 0) == [*range(50), 60]).all()
    env.step(env.action_space.sample(tuple(mask)))
    assert (np.flatnonzero(env.action_mask()[0] == 0) == [60]).all()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros(N), "the actions are float64 of shape"),
        (np.ones(N, bool), "the actions are bool of shape"),
        (3, r"the actions are int64 of shape \(\); they must be integers"),
        (None, "they must be integers of shape"),
        ([1, [2], 3, 4, 5], "they must be integers of shape"),
        (
            np.array([100, 100, 100, 2**63, 100], np.uint64),
            "row 3: action 9223372036854775808",
        ),
        (np.zeros(N - 1, int), r"integers of shape \(5,\)"),
        ([100, 100, -1, 100, 100], "row 2: action -1 is outside the vocabulary"),
        ([100, 100, 100, 10**6, 100], "row 3: action 1000000 is outside"),
        ([100, 60, 100, 100, 100], "row 1: action 60 is forbidden"),
    ],
)
def test_wrong_actions_change_nothing(actions, message):
    env = make_ours(forbidden_token_ids=[60])
    before, _ = env.reset(seed=0)
    with pytest.raises(InvalidAction, match=message):
        env.step(actions)
    after, *_ = env.step([100] * N)
    np.testing.assert_array_equal(before["length"] + 1, after["length"])


def test_out_of_turn():
    env = make_ours(autoreset_mode="Disabled", render_mode="ansi")
    for call in (lambda: env.step([100] * N), env.action_mask, env.render):
        with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
            call()
    with pytest.raises(UsageError, match="first reset"):
        env.reset(options={"reset_mask": np.arange(N) == 1})
    env.reset()
    env.step([100, 0, 100, 100, 100])
    with pytest.raises(ResetNeeded, match="row 1 has ended"):
        env.step([100] * N)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reset_mask": [True] * N}, "reset_mask must be a NumPy array of bool"),
        ({"reset_mask": np.ones(N)}, "reset_mask must be a NumPy array of bool"),
        ({"reset_mask": np.ones(N - 1, bool)}, r"of shape \(5,\)"),
        ({"reset_mask": np.zeros(N, bool)}, "chooses no row"),
        ({"mask": 1}, "'mask'"),
        ({"reset_mask": np.ones(N, bool), "promt": "A"}, "'promt'"),
        ({"prompt_index": 10**6}, "prompt_index is 1000000"),
        ("prompt", "the options of reset are a str; they must be a dict"),
        (3, "the options of reset are a int"),
    ],
)
def test_wrong_options(options, message):
    env, twin = make_ours(), make_ours()
    for e in (env, twin):
        e.reset(seed=0)
    with pytest.raises(UsageError, match=message):
        env.reset(seed=9, options=options)
    actions = np.full(N, 100)
    assert data_equivalence(env.step(actions), twin.step(actions), exact=True)
    assert data_equivalence(env.reset(), twin.reset(), exact=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs is 0; it must be at least 1"),
        ({"num_envs": 1.5}, r"num_envs is 1\.5; it must be an integer"),
        ({"num_envs": None}, "num_envs is None"),
        ({"autoreset_mode": None}, "autoreset_mode is None"),
        ({"autoreset_mode": "Never"}, "'NextStep', 'SameStep', 'Disabled'"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
        ({"prompt_order": "random"}, "prompt_order is 'random'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        QwenTextVectorEnv(**arguments)


def test_seeds_may_be_numpy_s():
    env, twin = make_ours(), make_ours()
    seeds = np.arange(7, 7 + N)
    assert data_equivalence(env.reset(seed=seeds), twin.reset(seed=np.int64(7)), exact=True)


@pytest.mark.parametrize("seed", [[1, 2], 1.5, {1, 2, 3, 4, 5}])
def test_wrong_seeds(seed):
    with pytest.raises(UsageError, match="it must be an integer, or a list of 5 integers or None"):
        make_ours().reset(seed=seed)


@pytest.mark.parametrize("seed", [-1, [1, 2, 3, 4, "5"], [1, 2, 3, 4, -5]])
def test_seeds_that_gymnasium_refuses_change_nothing(seed):
    env = make_ours()
    env.reset(seed=0)
    with pytest.raises(gym.error.Error, match="Seed must be"):
        env.reset(seed=seed)
    assert env.np_random_seed == tuple(range(N))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_goes_on_equally(clone):
    env = make_ours()
    env.reset(seed=3)
    actions = random_actions(env, 20)
    for now in actions[:10]:
        env.step(now)
    twin = clone(env)
    for now in actions[10:]:
        assert data_equivalence(env.step(now), twin.step(now), exact=True)


def test_spec_survives_json():
    env = make_ours(autoreset_mode="SameStep")
    text = env.spec.to_json()
    json.loads(text)
    again = gym.make_vec(EnvSpec.from_json(text))
    env.reset(seed=0)
    again.reset(seed=0)
    for actions in random_actions(env, 20):
        assert data_equivalence(env.step(actions), again.step(actions), exact=True)


def test_rendering():
    env = make_ours(render_mode="ansi")
    env.reset(options={"prompt": "The plot"})
    assert env.render() == ("The plot|",) * N
    env.step([100, 0, 100, 100, 100])
    texts = env.render()
    assert texts[1].startswith("The plot|")
    assert "[eos after 1 tokens, reward" in texts[1]
    assert "\n" not in texts[0]
    env.close()
    env.close()
