import copy
import dataclasses
import functools
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.utils.env_match import check_environments_match
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit

import qwen_env  # noqa: F401
from qwen_env.env import QwenTextEnv
from qwen_env.errors import UsageError
from qwen_env.rewards import RewardError

# Ids of the tokenizer of conftest.py: three special ones, then bytes and merges.
EOS, FORBIDDEN = 2, 7


def length_reward(batch):
    """Counts tokens, and names how it did."""
    counts = np.array([len(ids) for ids in batch.completion_ids], np.float32)
    return counts, {"double": 2 * counts}


@pytest.fixture
def env(backend):
    return QwenTextEnv(
        tokenizer=backend,
        eos_token_ids=EOS,
        prompts=["the film", {"prompt": "a plot", "colour": "red"}, "it's"],
        reward=length_reward,
        max_prompt_length=8,
        max_new_tokens=4,
        forbidden_token_ids=[FORBIDDEN],
    )


def play(env, actions, seed):
    """Everything that the environment says while it is stepped, reset where it ends."""
    said = [env.reset(seed=seed)]
    for action in actions:
        said.append(env.step(action))
        if said[-1][2] or said[-1][3]:
            said.append(env.reset())
    return said


@pytest.mark.parametrize("mode", [None, *QwenTextEnv.metadata["render_modes"]])
def test_check_env_has_nothing_to_say(mode, recwarn):
    # The smallest limits, at which a space might come to hold a single value.
    for limits in ({}, {"max_prompt_length": 1, "max_new_tokens": 2, "prompts": ["A"]}):
        env = gym.make("QwenText-v0", render_mode=mode, **limits)
        check_env(env.unwrapped)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
    assert not recwarn.list


def test_environments_match_in_what_they_render_too():
    first, second = (gym.make("QwenText-v0", render_mode="ansi") for _ in range(2))
    check_environments_match(first, second, num_steps=100, seed=5)


def test_make_by_module_name():
    assert isinstance(gym.make("qwen_env:QwenText-v0").unwrapped, QwenTextEnv)


@pytest.mark.parametrize("prompt_order", ["uniform", "shuffle", "sequential"])
def test_two_environments_with_one_seed_agree(prompt_order):
    first, second = (gym.make("QwenText-v0", prompt_order=prompt_order) for _ in range(2))
    assert first.observation_space == second.observation_space
    assert first.action_space == second.action_space
    actions = np.random.default_rng(0).integers(0, first.action_space.n, 120)
    said = play(first, actions, 7)
    assert data_equivalence(said, play(second, actions, 7), exact=True)
    assert all(step[0] in first.observation_space for step in said)
    assert not data_equivalence(play(first, actions, 7)[1:], play(second, actions[1:], 7))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize(
    "make",
    [QwenTextEnv, lambda: gym.make("QwenText-v0", prompt_order="shuffle", render_mode="ansi")],
)
def test_a_copy_goes_on_equally(clone, make):
    env = make()
    env.reset(seed=3)
    env.step(5)
    twin = clone(env)
    for action in (9, 300, 11):
        assert data_equivalence(env.step(action), twin.step(action), exact=True)
    assert data_equivalence(env.reset(), twin.reset(), exact=True)
    if env.render_mode:
        assert env.render() == twin.render()


def test_spec_survives_json():
    env = gym.make("QwenText-v0", max_new_tokens=5, forbidden_token_ids=[3], prompt_order="shuffle")
    text = env.spec.to_json()
    json.loads(text)
    again = gym.make(EnvSpec.from_json(text))
    assert again.spec == env.spec
    actions = np.full(20, 9)
    assert data_equivalence(play(env, actions, 1), play(again, actions, 1), exact=True)


def test_an_episode_ended_by_eos(env):
    observation, info = env.reset(options={"prompt_index": 1})
    assert info == {"prompt": "a plot", "prompt_index": 1}
    prompt = env.task.tokenizer.encode("a plot")
    assert observation["prompt_length"] == observation["length"] == len(prompt)
    assert observation["input_ids"][: len(prompt)].tolist() == prompt
    assert observation["attention_mask"].sum() == len(prompt)

    token = env.task.tokenizer.encode("!")[0]
    observation, reward, terminated, truncated, info = env.step(token)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    assert observation["input_ids"][len(prompt)] == token

    observation, reward, terminated, truncated, info = env.step(EOS)
    assert (reward, terminated, truncated) == (2.0, True, False)
    assert info == {
        "completion": "!",
        "completion_length": 2,
        "finish_reason": "eos",
        "reward_components": {"score": 2.0, "double": 4.0},
    }
    assert observation["length"] - observation["prompt_length"] == 2


def test_an_episode_cut_at_the_limit(env):
    env.reset(seed=0)
    for step in range(4):
        _, reward, terminated, truncated, info = env.step(40)
        assert (terminated, truncated) == (False, step == 3)
    assert reward == 4.0
    assert info["finish_reason"] == "length"


def test_flags_and_reward_are_plain_python(env):
    env.reset(seed=0)
    for action in (40, EOS):
        _, reward, terminated, truncated, _ = env.step(action)
        assert [type(x) for x in (reward, terminated, truncated)] == [float, bool, bool]


def test_the_caller_may_scribble_on_observations(env):
    observation, _ = env.reset(options={"prompt_index": 0})
    for array in observation.values():
        array[...] = 0
    observation, *_ = env.step(40)
    assert observation["attention_mask"].sum() == observation["length"]
    assert observation["length"] - observation["prompt_length"] == 1
    prompt = observation["input_ids"][: observation["prompt_length"].item()]
    assert env.task.tokenizer.decode(prompt) == "the film"


def test_the_reward_sees_the_row_and_the_tokens_as_chosen(backend):
    seen = []

    def reward(batch):
        seen.append(batch)
        return [0.0]

    row = {"prompt": "a plot", "colour": "red"}
    env = QwenTextEnv(
        tokenizer=backend, eos_token_ids=EOS, prompts=[row], reward=reward, max_new_tokens=4
    )
    env.reset()
    # Two tokens that would be one, were the text tokenised again.
    halves = [backend.token_to_id("t"), backend.token_to_id("h")]
    for action in (*halves, EOS):
        env.step(action)
    (batch,) = seen
    assert batch.completion_ids[0].tolist() == [*halves, EOS]
    assert (batch.prompts, batch.completions) == (["a plot"], ["th"])
    assert batch.rows == [row]
    assert batch.finish_reasons == ["eos"]
    assert batch.prompt_ids[0].tolist() == backend.encode("a plot").ids


def test_a_reward_that_scribbles_on_its_arrays_harms_nobody(env):
    def scribble(batch):
        for ids in (*batch.prompt_ids, *batch.completion_ids):
            ids[...] = 7
        return [0.0] * len(batch)

    twin = copy.deepcopy(env)
    env.task = dataclasses.replace(env.task, reward=scribble)
    for _ in range(2):
        starts = (e.reset(options={"prompt_index": 0}) for e in (env, twin))
        assert data_equivalence(*starts, exact=True)
        for action in (40, EOS):
            observations = (e.step(action)[0] for e in (env, twin))
            assert data_equivalence(*observations, exact=True)


def test_a_step_whose_reward_fails_is_not_taken(backend):
    def fails_at_first(batch):
        attempts.append(batch)
        if len(attempts) == 1:
            raise ConnectionError("no judge today")
        return length_reward(batch)

    attempts = [None]  # the construction of the environment must not call it
    env = QwenTextEnv(
        tokenizer=backend, eos_token_ids=EOS, prompts=["a plot"], reward=fails_at_first
    )
    env.reset()
    env.step(40)
    attempts.clear()
    before = env.action_mask()
    with pytest.raises(RewardError, match="fails_at_first raised ConnectionError: no judge today"):
        env.step(EOS)
    np.testing.assert_array_equal(env.action_mask(), before)
    _, reward, terminated, _, info = env.step(EOS)
    assert (reward, terminated, info["completion_length"]) == (2.0, True, 2)


def test_missing_eos_penalty(backend):
    env = QwenTextEnv(
        tokenizer=backend,
        eos_token_ids=EOS,
        prompts=["a"],
        reward=length_reward,
        max_new_tokens=2,
        missing_eos_penalty=0.5,
    )
    env.reset()
    env.step(40)
    *_, info = step = env.step(40)
    assert step[1] == 1.5
    components = {"score": 2.0, "double": 4.0, "missing_eos_penalty": -0.5}
    assert info["reward_components"] == components
    env.reset()
    *_, info = step = env.step(EOS)
    assert (step[1], info["reward_components"]["missing_eos_penalty"]) == (1.0, 0.0)


@pytest.mark.parametrize("kind", [int, np.int32, np.int64, np.uint8, np.array])
def test_integer_actions_of_any_kind(env, kind):
    env.reset()
    observation, *_ = env.step(kind(40))
    assert observation["input_ids"][observation["length"] - 1] == 40


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (1.0, "action 1.0 is not an integer"),
        ("the", "is not an integer"),
        (True, "action True is not an integer"),
        (None, "is not an integer"),
        (np.array([3, 4]), "is not an integer"),
        (-1, "action -1 is outside the vocabulary; ids run from 0 to"),
        (10**9, "action 1000000000 is outside the vocabulary"),
        (FORBIDDEN, f"action {FORBIDDEN} is forbidden"),
    ],
)
def test_wrong_actions(env, action, message):
    before, _ = env.reset(seed=0)
    with pytest.raises(InvalidAction, match=message):
        env.step(action)
    after, *_ = env.step(40)
    assert after["length"] == before["length"] + 1


def test_a_padded_vocabulary(backend):
    size = backend.get_vocab_size()
    env = QwenTextEnv(
        tokenizer=backend, eos_token_ids=EOS, prompts=["a"], reward=length_reward,
        vocab_size=size + 5, min_new_tokens=1,
    )  # fmt: skip
    env.reset(seed=0)
    mask = env.action_mask()
    assert (mask.dtype, mask.shape) == (np.int8, (size + 5,))
    assert np.flatnonzero(mask == 0).tolist() == [EOS, *range(size, size + 5)]
    with pytest.raises(InvalidAction, match=f"action {size} is forbidden"):
        env.step(size)
    with pytest.raises(InvalidAction, match="forbidden"):
        env.step(EOS)
    env.action_space.seed(0)
    env.step(env.action_space.sample(mask))
    assert env.action_mask()[EOS] == 1


def test_step_and_friends_out_of_turn(env):
    for call in (lambda: env.step(3), env.action_mask):
        with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
            call()
    env.reset()
    env.step(EOS)
    with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
        env.step(3)
    env.reset()
    env.step(3)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_seeds_may_be_numpy_s(env, kind):
    assert data_equivalence(env.reset(seed=kind(255)), env.reset(seed=255), exact=True)
    assert env.np_random_seed == 255


@pytest.mark.parametrize(
    "make",
    [
        gym.make,
        gym.make_vec,
        functools.partial(gym.make_vec, vectorization_mode="sync"),
        lambda env_id, max_episode_steps, **arguments: TimeLimit(
            RecordEpisodeStatistics(gym.make(env_id, **arguments)), max_episode_steps
        ),
    ],
)
def test_a_time_limit_that_cuts_episodes_off_is_refused(make):
    with pytest.raises(UsageError, match=r"max_episode_steps is 5, .* max_new_tokens \(now 8\)"):
        make("QwenText-v0", max_episode_steps=5, max_new_tokens=8).reset()


def test_other_time_limits_are_welcome():
    """At the response limit it changes nothing; and one around another environment is not ours."""
    envs = gym.make_vec("QwenText-v0", max_episode_steps=9, max_new_tokens=8)
    envs.reset()
    env = gym.make("QwenText-v0", max_episode_steps=2, max_new_tokens=2, reward=length_reward)
    env.reset(seed=0)
    env.step(100)
    _, reward, terminated, truncated, info = env.step(100)
    assert (reward, terminated, truncated) == (2.0, False, True)
    assert info["finish_reason"] == "length"

    class MakesOneAtReset(gym.Wrapper):
        def reset(self, **arguments):
            self.made = gym.make("QwenText-v0")
            self.made.reset()
            return super().reset(**arguments)

    TimeLimit(MakesOneAtReset(env), 3).reset()


def test_a_prompt_by_the_options(env):
    observation, info = env.reset(options={"prompt": "it"})
    assert info == {"prompt": "it", "prompt_index": -1}
    assert observation["length"] == len(env.task.tokenizer.encode("it"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt": "a"}, "'promt'.*'prompt', 'messages', 'prompt_index'"),
        ("prompt", "the options of reset are a str; they must be a dict"),
        (["prompt"], "the options of reset are a list"),
        (3, "the options of reset are a int"),
        ({"prompt": "a", "prompt_index": 1}, "takes one of"),
        ({"prompt": 3}, "'prompt' that is 3; it must be text"),
        ({"prompt": None}, "'prompt' that is None; it must be text"),
        ({"prompt": "half a pair: \ud800"}, "not valid Unicode"),
        ({"messages": None}, "neither 'prompt' .text. nor 'messages'"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": "word " * 20}, "over the limit of 8"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no chat template"),
        ({"prompt_index": 1.0}, r"prompt_index is 1\.0"),
        ({"prompt_index": None}, "prompt_index is None"),
        ({"prompt_index": 3}, "prompt_index is 3; .* 0 to 2"),
        ({"prompt_index": -1}, "prompt_index is -1"),
        ({"prompt_index": "1"}, "prompt_index is '1'"),
        ({"prompt_index": True}, "prompt_index is True"),
    ],
)
def test_wrong_options(env, options, message):
    before, _ = env.reset(seed=0)
    with pytest.raises(UsageError, match=message):
        env.reset(options=options)
    after, *_ = env.step(40)
    assert after["length"] == before["length"] + 1, "the episode goes on"


def test_a_chat_by_the_options(folder):
    template = "{{ mood }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    env = QwenTextEnv(
        tokenizer=folder, prompts=["a"], reward=length_reward, chat_template=template,
        chat_template_kwargs={"mood": "glad"}, system_prompt="s",
    )  # fmt: skip
    chat = [{"role": "user", "content": "hi"}]
    observation, info = env.reset(options={"messages": chat})
    assert info == {"prompt": "glad<system>s<user>hi", "prompt_index": -1}
    assert observation["length"] == len(env.task.tokenizer.encode(info["prompt"]))
    for wrong, message in (
        ([], "messages is empty"),
        ("hi", "messages is a str; it must be a list"),
        ([{"content": "hi"}], "message 0 is"),
    ):
        with pytest.raises(UsageError, match=f"the option of reset: {message}"):
            env.reset(options={"messages": wrong})


def test_a_prompt_asked_for_is_never_dropped(backend):
    env = QwenTextEnv(
        tokenizer=backend, eos_token_ids=EOS, prompts=["a"], max_prompt_length=2,
        prompt_overflow="drop",
    )  # fmt: skip
    with pytest.raises(UsageError, match="over the limit of 2"):
        env.reset(options={"prompt": "word word word"})


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_a_prompt_goes_by_its_number_in_the_source(make, backend):
    env = make(
        "QwenText-v0", tokenizer=backend, eos_token_ids=EOS, prompts=["word word", "b", "c"],
        max_prompt_length=2, prompt_overflow="drop",
    )  # fmt: skip
    for index, text in ((1, "b"), (2, "c")):
        _, info = env.reset(options={"prompt_index": index})
        assert (info["prompt"], info["prompt_index"]) == (text, index)
    for index in (0, 3):
        with pytest.raises(UsageError, match=f"prompt_index is {index}; .*not dropped, from 1 to"):
            env.reset(options={"prompt_index": index})


def test_a_slice_of_the_prompts_keeps_their_numbers(env):
    some = QwenTextEnv(
        tokenizer=env.task.tokenizer, eos_token_ids=EOS, prompts=env.task.prompts[1:]
    )
    _, info = some.reset(options={"prompt_index": 2})
    assert info == {"prompt": "it's", "prompt_index": 2}


def test_options_may_change_after_the_reset(env):
    seen = []
    env.task = dataclasses.replace(env.task, reward=lambda batch: seen.append(batch.rows) or [0.0])
    options = {"prompt": "it"}
    env.reset(options=options)
    options["prompt"] = "another"
    env.step(EOS)
    assert seen == [[{"prompt": "it"}]]
