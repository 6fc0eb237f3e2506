"""Conversations in the environments: what is asked, said, observed and paid."""

import asyncio
import pickle
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import qwen_env  # noqa: F401  (registers QwenText-v0)
from qwen_env.errors import InteractionError, UsageError
from qwen_env.interaction import EachTurn, Reply, TurnBatch, ask
from qwen_env.rewards import RewardBatch

EOS = 0
asked = []  # the batches that `counting` was asked about


def counting(batch: TurnBatch) -> list[Reply]:
    """Says how often it was asked; the fourth turn is the last."""
    asked.append(batch)
    states = [(state or 0) + 1 for state in batch.states]
    return [
        Reply(text=f" {state}!", reward=state / 10, done=state == 4, state=state, info={"n": state})
        for state in states
    ]


def count_turns(batch: RewardBatch) -> np.ndarray:
    return np.array([text.count("\n") + 1 for text in batch.completions], np.float32)


ARGUMENTS = {
    "prompts": ["The plot", "It was"],
    "prompt_order": "sequential",
    "reward": count_turns,
    "eos_token_ids": EOS,
    "max_new_tokens": 24,
    "interaction": counting,
    "max_turns": 5,
}


def test_one_conversation_token_by_token():
    env = gym.make("QwenText-v0", **ARGUMENTS).unwrapped
    encode = env.task.tokenizer.encode
    observation, _ = env.reset(seed=0)
    prompt = encode("The plot")
    assert not observation["response_mask"].any()
    a, b = encode(" film")[0], encode(" good")[0]
    tokens, own = list(prompt), [0] * len(prompt)
    for turn in range(1, 5):
        observation, reward, *flags, info = env.step(a)
        assert (reward, flags, info) == (0.0, [False, False], {})
        observation, reward, terminated, truncated, info = env.step(b if turn < 4 else EOS)
        tokens, own = [*tokens, a], [*own, 1]
        if turn < 4:  # not ended yet
            assert (reward, info) == (0.0, {})
            tokens, own = [*tokens, b], [*own, 1]
            observation, reward, terminated, truncated, info = env.step(EOS)
        tokens, own = [*tokens, EOS], [*own, 1]
        assert info["turn"] == turn
        assert info["reply"] == f" {turn}!"
        assert info["reply_info"] == {"n": turn}
        if turn < 4:
            assert reward == pytest.approx(turn / 10)
            reply = encode(f" {turn}!")
            tokens, own = [*tokens, *reply], [*own, *[0] * len(reply)]
            assert (terminated, truncated) == (False, False)
        length = observation["length"].item()
        assert observation["input_ids"][:length].tolist() == tokens
        assert observation["response_mask"][:length].tolist() == own
        assert not observation["response_mask"][length:].any()
    assert (terminated, truncated) == (True, False)
    assert info["finish_reason"] == "done"
    assert info["completion"] == " film good\n film good\n film good\n film"
    assert info["completion_length"] == 11
    assert reward == pytest.approx(0.4 + 4)
    components = info["reward_components"]
    assert components["score"] == 4 and components["turn_rewards"] == pytest.approx(1.0)


def test_what_the_interaction_is_asked():
    asked.clear()
    envs = gym.make_vec("QwenText-v0", num_envs=3, **ARGUMENTS)
    envs.reset(seed=0)
    word = envs.unwrapped.task.tokenizer.encode(" film")[0]
    envs.step(np.array([word, word, EOS]))
    envs.step(np.array([EOS, EOS, word]))
    envs.step(np.array([word, EOS, EOS]))
    assert [len(batch) for batch in asked] == [1, 2, 2], "all that wait are asked about at once"
    turn = asked[2][0]
    assert turn.completion == "" and turn.completion_ids.tolist() == [EOS]
    assert turn.messages == (
        {"role": "user", "content": "The plot"},
        {"role": "assistant", "content": " film"},
        {"role": "user", "content": " 1!"},
        {"role": "assistant", "content": ""},
    )
    assert (turn.number, turn.state, turn.row) == (2, 1, {"prompt": "The plot"})
    assert len({*asked[0].seeds, *asked[1].seeds}) == 3, "a seed each"
    assert asked[2].seeds == [asked[1].seeds[1], asked[0].seeds[0]], "and the same at every turn"


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_rows_of_a_vector_environment_are_single_environments(mode):
    envs = gym.make_vec("QwenText-v0", num_envs=3, autoreset_mode=mode, **ARGUMENTS)
    singles = [gym.make("QwenText-v0", **ARGUMENTS) for _ in range(3)]
    rng = np.random.default_rng(0)
    said, _ = envs.reset(seed=7)
    rows = [single.reset(seed=7 + i)[0] for i, single in enumerate(singles)]
    ended = np.zeros(3, bool)
    for _ in range(80):
        if mode == "Disabled" and ended.any():
            said, _ = envs.reset(options={"reset_mask": ended})
            for i in np.flatnonzero(ended):
                rows[i] = singles[i].reset()[0]
            ended[:] = False
        actions = np.where(rng.random(3) < 0.4, EOS, rng.integers(300, 320, 3))
        said, rewards, terminated, truncated, infos = envs.step(actions)
        for i, single in enumerate(singles):
            if mode == "NextStep" and ended[i]:
                rows[i], ended[i] = single.reset()[0], False
                assert rewards[i] == 0
                continue
            rows[i], reward, *flags, info = single.step(actions[i])
            assert rewards[i] == reward
            assert flags == [terminated[i], truncated[i]]
            ended[i] = any(flags)
            last = infos["final_info"] if mode == "SameStep" and ended[i] else infos
            for name in ("turn", "reply", "completion", "finish_reason"):
                assert (name in info) == bool(f"_{name}" in last and last[f"_{name}"][i])
                assert name not in info or last[name][i] == info[name]
            if "reply_info" in info:
                assert last["reply_info"]["n"][i] == info["reply_info"]["n"]
            if mode == "SameStep" and ended[i]:
                rows[i] = single.reset()[0]
        for name in said:
            for i in range(3):
                np.testing.assert_array_equal(said[name][i], rows[i][name])


def test_the_environment_conforms(recwarn):
    check_env(gym.make("QwenText-v0", **ARGUMENTS).unwrapped)


def test_rendering_with_roles():
    env = gym.make("QwenText-v0", render_mode="ansi", **ARGUMENTS | {"max_turns": 2})
    env.reset(seed=0)
    word = env.unwrapped.task.tokenizer.encode(" film")[0]
    env.step(word)
    assert env.render() == "The plot| film"
    env.step(EOS)
    assert env.render() == "The plot| film\nuser:  1!\nassistant: "
    env.step(word)
    env.step(EOS)
    text = "The plot| film\nuser:  1!\nassistant:  film\n[eos after 4 tokens, reward +2.300]\n"
    assert env.render() == text


def test_a_pickled_environment_goes_on_alike():
    env = gym.make("QwenText-v0", **ARGUMENTS).unwrapped
    env.reset(seed=3)
    env.step(EOS)
    other = pickle.loads(pickle.dumps(env))
    for _ in range(3):
        mine, theirs = env.step(EOS), other.step(EOS)
        np.testing.assert_array_equal(mine[0]["input_ids"], theirs[0]["input_ids"])
        assert mine[1:4] == theirs[1:4]


def test_a_reply_without_room_truncates():
    env = gym.make("QwenText-v0", **ARGUMENTS | {"max_new_tokens": 5, "missing_eos_penalty": 2})
    env.reset(seed=0)
    *_, info = env.step(EOS)
    assert not info.get("finish_reason"), "' 1!' and an action fit"
    observation, reward, terminated, truncated, info = env.step(EOS)
    assert (terminated, truncated) == (False, True)
    assert info["finish_reason"] == "overflow" and info["reply"] == " 2!"
    assert reward == pytest.approx(0.2 + 2 - 2)
    assert observation["response_mask"].sum() == info["completion_length"] == 2


def test_with_one_turn_it_is_asked_about_the_only_one():
    asked.clear()
    env = gym.make("QwenText-v0", **ARGUMENTS | {"max_turns": 1})
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(EOS)
    assert terminated and len(asked) == 1
    assert reward == pytest.approx(0.1 + 1)
    assert (info["turn"], info["finish_reason"]) == (1, "eos")


def test_equal_seeds_ask_alike():
    seeds = []
    for _ in range(2):
        asked.clear()
        env = gym.make("QwenText-v0", **ARGUMENTS)
        for seed in (11, None):
            env.reset(seed=seed)
            env.step(EOS)
        env.reset(options={"episode_seed": 5})
        env.step(EOS)
        seeds.append([batch.seeds[0] for batch in asked])
    assert seeds[0] == seeds[1]
    assert seeds[0][2] == 5 and len(set(seeds[0])) == 3
    with pytest.raises(UsageError, match="episode_seed is -1"):
        env.reset(options={"episode_seed": -1})


class Wrong:
    """Answers the second turn in a wrong way."""

    def __init__(self, answer):
        self.answer = answer

    def reply(self, batch):
        if batch.turns[0] == 2:
            return self.answer(batch)
        return [Reply(text=" fine") for _ in batch]


def boom(batch):
    raise LookupError("no such tool")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (boom, r"test_turns.Wrong raised LookupError: no such tool .*, for turn 2 \(' film'\)"),
        (lambda batch: [], "returned 0 replies to 1 turns; it must return one to each"),
        (lambda batch: None, "raised TypeError"),
        (
            lambda batch: ["hot"],
            r"returned 'hot', which is no Reply, to turn 2 \(' film'\) of the row {'prompt': 'The",
        ),
        (lambda batch: [Reply(text="x", ids=[1])], "replied with both text and ids"),
        (lambda batch: [Reply(text="x", reward=float("nan"))], "gave the reward nan"),
        (lambda batch: [Reply(text="x", reward="much")], "gave the reward 'much'"),
        (lambda batch: [Reply(text="x", reward=1e60)], "gave the reward 1e.60"),
        (lambda batch: [Reply(text="x", info=3)], "gave the info 3"),
        (lambda batch: [Reply(text="")], "it holds no tokens; end the episode with done=True"),
        (lambda batch: [Reply(ids=[])], "it holds no tokens"),
        (lambda batch: [Reply(ids=[1, 714])], r"it holds the id 714, .* \(0 to 713\)"),
        (lambda batch: [Reply(ids=[-1])], "it holds the id -1"),
        (lambda batch: [Reply(ids="abc")], "an id is 'a'; it must be an integer"),
        (lambda batch: [Reply(text=5)], "it holds .*5.*; a message has 'role' and 'content'"),
        (lambda batch: [Reply(messages=[])], "it holds no tokens"),
        (lambda batch: [Reply(messages="hi")], "its messages are 'hi'"),
        (lambda batch: [Reply(messages=[{"role": "user"}])], "a message has 'role' and 'content'"),
    ],
)
def test_wrong_answers_name_the_interaction_and_the_turn(answer, message):
    env = gym.make("QwenText-v0", **ARGUMENTS | {"interaction": Wrong(answer)}).unwrapped
    env.reset(seed=0)
    word = env.task.tokenizer.encode(" film")[0]
    env.step(EOS)
    before, *_ = env.step(word)
    for _ in range(2):  # the step was not taken, so that it fails again
        with pytest.raises(InteractionError, match=message):
            env.step(EOS)
    after, *_ = env.step(word)
    assert after["length"] == before["length"] + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interaction": None}, "max_turns is 5, but there is no interaction"),
        ({"interaction": 3}, "interaction is 3; give an object with a method reply"),
        ({"interaction": "nowhere"}, "interaction is 'nowhere'; name it as"),
        ({"interaction": "qwen_env.nowhere:x"}, "there is no module 'qwen_env.nowhere'"),
        ({"interaction": "qwen_env.interaction:Nobody"}, "has no callable 'Nobody'"),
        ({"max_turns": 0}, "max_turns is 0"),
        ({"max_turns": 1.5}, "max_turns is 1.5; it must be an integer"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(UsageError, match=message):
        gym.make("QwenText-v0", **ARGUMENTS | changes)


def test_the_turn_that_was_at_hand_is_named():
    def opens_doors(batch):
        return [Reply(text={"a": "b"}[turn.completion]) for turn in batch]

    message = r"for a batch of 2 turns, it seems at turn 1 \('c'\) of the row {'prompt': 'C'}"
    rows = [{"prompt": "A"}, {"prompt": "C"}]
    columns = [["a", "c"], [[1]] * 2, [[]] * 2, rows, [1, 1], [None] * 2, [0] * 2]
    with pytest.raises(InteractionError, match=message):
        ask(opens_doors, TurnBatch(*columns))


def test_an_interaction_by_name():
    env = gym.make("QwenText-v0", **ARGUMENTS | {"interaction": f"{__name__}:counting"})
    env.reset(seed=0)
    assert env.step(EOS)[-1]["turn"] == 1


class TestEachTurn:
    """Slow functions, a call a turn."""

    @staticmethod
    def batch(count):
        texts = [str(i) for i in range(count)]
        columns = [[1]] * count, [[]] * count, [{}] * count
        return TurnBatch(texts, *columns, [1] * count, [None] * count, [0] * count)

    def test_calls_run_side_by_side(self):
        async def later(turn):
            await asyncio.sleep(0.3)
            return Reply(text=turn.completion)

        def slow(turn):
            time.sleep(0.3)
            return Reply(text=turn.completion)

        for function in (later, slow):
            start = time.perf_counter()
            replies = ask(EachTurn(function, at_once=32), self.batch(32))
            assert [reply.text for reply in replies] == [str(i) for i in range(32)]
            assert time.perf_counter() - start < 4.8, "half of one after the other"

    def test_failures_name_the_function_and_the_turn(self):
        def third(turn):
            if turn.completion == "2":
                raise KeyError("door")
            return Reply(text="x")

        def late(turn):
            time.sleep(5)

        with pytest.raises(InteractionError, match=r"third raised KeyError.*, for turn 1 \('2'\)"):
            ask(EachTurn(third), self.batch(4))
        with pytest.raises(InteractionError, match=r"late raised TimeoutError: .* more than 0.2 s"):
            ask(EachTurn(late, timeout=0.2), self.batch(2))
        with pytest.raises(InteractionError, match="returned None, which is no Reply"):
            ask(EachTurn(lambda turn: None, timeout=9), self.batch(1))
