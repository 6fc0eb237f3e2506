"""Games of the package: played by somebody who can, and by somebody who cannot."""

import pickle
import random

import gymnasium as gym
import numpy as np
import pytest
import textarena as package

import qwen_env  # noqa: F401  (registers QwenText-v0)
from qwen_env import watchdog
from qwen_env.errors import InteractionError, RewardError, UsageError
from qwen_env.interaction import TurnBatch, ask
from qwen_env.rewards import RewardBatch, score
from qwen_env.tasks import load_named_task

SPEC = "textarena:GuessTheNumber-v0?min_number=1&max_number=15&size=6&held_out_size=3"


@pytest.fixture(scope="module")
def task():
    return load_named_task(SPEC)


def talk(*moves):
    """A conversation in which the policy said `moves`."""
    said = [{"role": "user", "content": "The rules"}]
    for move in moves:
        said += [{"role": "assistant", "content": move}, {"role": "user", "content": "so"}]
    return said[:-1]


def reply(task, row, *moves):
    batch = TurnBatch([moves[-1]], [[1]], [talk(*moves)], [row], [len(moves)], [None], [0])
    (answer,) = ask(task.interaction, batch)
    return answer


def scored(task, row, *moves, reason="done"):
    ids = [np.zeros(1, int)]
    batch = RewardBatch([""], [""], ids, ids, [row], [reason], [talk(*moves)])
    scores = score(task.reward, batch)
    return scores.values[0], {name: value[0] for name, value in scores.components.items()}


def say(env, text):
    for token in (*env.task.tokenizer.encode(text), env.task.rules.eos_token_ids[0]):
        result = env.step(token)
    return result


def number_of(seed):
    """What the package itself draws."""
    env = package.make("GuessTheNumber-v0-raw", min_number=1, max_number=15)
    env.reset(num_players=1, seed=seed)
    return env.game_number


def test_bisection_wins_through_the_environment(task):
    env = gym.make("QwenText-v0", task=SPEC, max_new_tokens=400).unwrapped
    for index, row in enumerate(task.prompts):
        _, info = env.reset(options={"prompt_index": index})
        assert info["prompt"].startswith("You are Player 0. You are playing Guess The Number.")
        low, high, terminated, rewards = 1, 15, False, []
        while not terminated:
            guess = (low + high) // 2
            _, reward, terminated, _, info = say(env, str(guess))
            rewards.append(reward)
            low, high = (guess + 1, high) if "is higher" in info["reply"] else (low, guess - 1)
        assert (guess, info["finish_reason"]) == (number_of(row["game_seed"]), "done")
        assert info["reply"] == "Congratulations! You guessed the correct number."
        assert rewards == [*[0.0] * (len(rewards) - 1), 1.0] and len(rewards) <= 4
        components = info["reward_components"]
        assert (components["accuracy"], components["turns"]) == (1, len(rewards))


def test_games_differ_and_those_held_out_are_others(task):
    seeds = [row["game_seed"] for row in (*task.prompts, *task.held_out)]
    assert len(set(seeds)) == 9
    other = load_named_task(f"{SPEC}&seed=6")
    assert not {row["game_seed"] for row in other.prompts} & set(seeds)
    lakes = load_named_task("textarena:FrozenLake-v0?size=5&randomize_start_goal=true").prompts
    assert len({row["prompt"] for row in lakes}) == 5, "what is drawn is shown at once"


def test_what_a_move_is_answered(task):
    row = task.prompts[0]
    number = number_of(row["game_seed"])
    assert number > 2
    assert reply(task, row, "2").text == "The target number is higher."
    assert reply(task, row, "I say [2]").text == "The target number is higher."
    first = reply(task, row, "[two]")
    assert not first.done and first.text.startswith("You attempted an invalid move.")
    second = reply(task, row, "[two]", "[three]")
    assert second.done and second.text.startswith("Invalid Move: Invalid move format.")
    assert reply(task, row, "2", str(number)).done


def test_what_games_are_worth(task):
    row = task.prompts[0]
    number = str(number_of(row["game_seed"]))
    won = {"accuracy": 1, "turns": 2, "game_error": 0}
    assert scored(task, row, "2", number) == (1, won)
    assert scored(task, row, "2", number, reason="length") == (
        0,
        {"accuracy": 0, "turns": 1, "game_error": 0},
    ), "a move that was cut off is none"
    assert scored(task, row, "2", reason="eos")[0] == 0, "it was not played to its end"
    near, _ = scored(task, row, "2", "2", "2")
    assert near == pytest.approx(1 - (int(number) - 2) / 14), "what the game pays for coming near"


def test_replies_are_pure(task):
    """Asked again, in any order, with nothing kept, or by a copy, they are the same; and nobody's
    chances change."""
    row = task.prompts[1]
    moves = ["3", "9", "6"]
    expected = [reply(task, row, *moves[: i + 1]) for i in range(3)]
    copy = load_named_task(SPEC)
    random.seed(1)
    before = generators()
    assert [reply(copy, row, *moves[: i + 1]) for i in (2, 0, 1)] == [
        expected[i] for i in (2, 0, 1)
    ]
    assert generators() == before
    pickled = pickle.loads(pickle.dumps(task.interaction))
    assert pickled.opening(5) == task.interaction.opening(5)


def generators():
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_a_game_with_chances_of_its_own_is_the_same_game_again():
    """It draws at every move, from the generator that it shares with everybody."""
    spec = "textarena:Blackjack-v0?size=2&held_out_size=1"
    one, other = load_named_task(spec), load_named_task(spec)
    row = one.prompts[0]
    moves = ["[hit]"] * 6
    for i in range(1, 7):
        random.seed(i)
        answer = reply(one, row, *moves[:i])
        if answer.done:
            break
    random.seed(99)
    assert reply(other, row, *moves[:i]) == answer


def endless(self, action):
    while True:
        pass


def broken(self, action):
    raise IndexError("no such card")


@pytest.mark.parametrize(
    ("step", "error"),
    [(broken, "IndexError: no such card"), (endless, "TooLong: it took more than 0.2 seconds")],
)
def test_a_move_on_which_the_package_fails_or_hangs_ends_the_game(task, monkeypatch, step, error):
    monkeypatch.setattr(watchdog, "SECONDS", 0.2)
    kind = package.envs.GuessTheNumber.env.GuessTheNumberEnv
    monkeypatch.setattr(kind, "step", step)
    row = task.prompts[2]
    answer = reply(task, row, error)  # a move that no other test has made
    assert answer.done and answer.text == f"Error: {error}"
    assert scored(task, row, error) == (0, {"accuracy": 0, "turns": 1, "game_error": 1})


def test_prompts_without_a_game(task):
    with pytest.raises(InteractionError, match=r"turn 1 .'3'. of the row .* no 'game_seed'"):
        reply(task, {"prompt": "mine"}, "3")
    with pytest.raises(RewardError, match=r"row 0 \(prompt ''\) has no 'game_seed', so textar"):
        scored(task, {"prompt": "mine"}, "3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("textarena", "textarena has no game ''.* as in 'textarena:GuessTheNumber-v0'"),
        ("textarena:GuesTheNumber-v0", "perhaps you meant 'GuessTheNumber-v0'"),
        ("textarena:Chopsticks-v0", "textarena:Chopsticks-v0 cannot be begun by one player"),
        ("textarena:MarketEntryGame-v0", "is a game of several players; name one of a single"),
        ("textarena:TwentyQuestions-v0", "cannot be begun by one player .ValueError: OpenRouter"),
        (f"{SPEC}&max_numbr=3", "no option 'max_numbr'; perhaps you meant 'max_number'"),
        (f"{SPEC}&max_turns=x", "max_turns of textarena:GuessTheNumber-v0 is 'x'"),
        ("textarena:GuessTheNumber-v0?size=0", "size is 0; it must be at least 1"),
        ("textarena:GuessTheNumber-v0?seed=-1", "seed is -1; it must be at least 0"),
        ("textarena:GuessTheNumber-v0?min_number=30", "cannot be begun .*empty range"),
    ],
)
def test_wrong_names(spec, message, monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(UsageError, match=message):
        load_named_task(spec)
