"""Tasks of several turns: played by players that know how."""

import gymnasium as gym
import numpy as np
import pytest

import qwen_env  # noqa: F401  (registers QwenText-v0)
from qwen_env.errors import UsageError
from qwen_env.interaction import TurnBatch
from qwen_env.rewards import RewardBatch
from qwen_env.tasks import load_named_task
from qwen_env.tasks.calculator import answer_of, calculator_task
from qwen_env.tasks.guess_the_number import GuessTheNumber


def say(env, text):
    for token in (*env.task.tokenizer.encode(text), env.task.rules.eos_token_ids[0]):
        result = env.step(token)
    return result


@pytest.mark.parametrize("rewards", ["end", "turns"])
def test_bisection_always_finds_the_number(rewards):
    task = f"guess_the_number?low=1&high=15&rewards={rewards}"
    env = gym.make("QwenText-v0", task=task, max_new_tokens=200).unwrapped
    assert env.task.rules.max_turns == 4
    for seed in range(8):
        env.reset(options={"episode_seed": seed})
        low, high, total = 1, 15, 0.0
        turn, terminated = 0, False
        while not terminated:
            turn += 1
            guess = (low + high) // 2
            _, reward, terminated, _, info = say(env, str(guess))
            total += reward
            if terminated:
                break
            assert turn < 4
            low, high = (guess + 1, high) if info["reply"] == "higher" else (low, guess - 1)
        number = GuessTheNumber(1, 15).number(seed)
        assert (guess, info["finish_reason"]) == (number, "done")
        assert info["reward_components"]["accuracy"] == 1
        assert info["reward_components"]["turns"] == turn
        assert total == pytest.approx(1 if rewards == "end" else 2), "all bits are found out"


def test_what_is_no_number_costs_a_turn():
    game = GuessTheNumber(1, 9, rewards_turns=True)
    seed = next(seed for seed in range(99) if game.number(seed) == 6)

    def reply(text, state=None):
        (answer,) = game.reply(TurnBatch([text], [[1]], [[]], [{}], [1], [state], [seed]))
        return answer.text, answer.done, round(answer.reward, 6), answer.state

    assert reply("six") == ("Write one number from 1 to 9.", False, 0.0, (1, 9))
    assert reply("4") == ("higher", False, round(np.log(9 / 5) / np.log(9), 6), (5, 9))
    assert reply("4", (5, 9)) == ("higher", False, 0.0, (5, 9)), "which it knew"
    assert reply(" 100. ", (5, 9)) == ("lower", False, 0.0, (5, 9))
    assert reply("6", (5, 9)) == (None, True, round(np.log(5) / np.log(9), 6), (6, 6))


def test_every_number_comes_up():
    game = GuessTheNumber(3, 5)
    assert {game.number(seed) for seed in range(50)} == {3, 4, 5}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("guess_the_number:hard", "guess_the_number:hard: it has no variants"),
        ("guess_the_number?lo=1", "no option 'lo'; perhaps you meant 'low'; it takes low, high"),
        ("guess_the_number?low=x", "low is 'x'; it must be an integer"),
        ("guess_the_number?low=5&high=5", "low is 5 and high is 5; high must be above low"),
        ("guess_the_number?turns=0", "turns is 0; it must be at least 1"),
        ("guess_the_number?rewards=many", "rewards is 'many'; it must be 'end' or 'turns'"),
        ("calculator?digit=3", "no option 'digit'; perhaps you meant 'digits'"),
        ("calculator?digits=x", "digits is 'x'; it must be an integer"),
        ("calculator?digits=10", "digits is 10; it must be from 1 to 9"),
        ("calculator:big", "calculator:big: it has no variants"),
        ("guess_the_numbers", "perhaps you meant 'guess_the_number'"),
    ],
)
def test_wrong_names(spec, message):
    with pytest.raises(UsageError, match=message):
        load_named_task(spec)


def test_a_task_s_interaction_is_its_own():
    with pytest.raises(UsageError, match="guess_the_number has an interaction of its own"):
        gym.make("QwenText-v0", task="guess_the_number", interaction=lambda batch: [])


class TestCalculator:
    def test_its_rows(self):
        task = calculator_task(digits=2)
        questions = [row["messages"][0]["content"] for row in (*task.prompts, *task.held_out)]
        assert len(set(questions)) == len(questions) == 2200
        for row in task.prompts[:50]:
            text = row["messages"][0]["content"].removeprefix("What is ").removesuffix("?")
            assert row["answer"] == str(eval(text))
            assert row["tools"][0]["function"]["name"] == "calculator"

    def test_what_is_right(self):
        task = calculator_task()
        row = {"answer": "-12", "messages": []}
        talks = [
            [("assistant", "It is -12.")],
            [("assistant", "<tool_call>"), ("tool", "-12"), ("assistant", "So -12")],
            [("assistant", "<tool_call>"), ("tool", "Error: no"), ("assistant", "So 12")],
            [("assistant", "<tool_call>"), ("tool", "-12")],
        ]
        messages = [[{"role": r, "content": text} for r, text in talk] for talk in talks]
        ids = [np.zeros(1, int)] * 4
        batch = RewardBatch([""] * 4, [""] * 4, ids, ids, [row] * 4, ["eos"] * 4, messages)
        scores, components = task.reward(batch)
        assert scores.tolist() == components["accuracy"].tolist() == [1, 1, 0, 0]
        assert components["used_tool"].tolist() == [0, 1, 0, 1]
        assert answer_of("no number") is None
