"""The runs over turns: what is demonstrated, imitated, and made of the records."""

import runpy
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from learning import tiny, turns, turns_report, turns_settings
from learning.turns_settings import BY_NAME, CALCULATOR, END, SETTINGS, TRAP

from qwen_env import mdp
from qwen_env.errors import UsageError
from qwen_env.tools import calculator


@cache
def fewest_turns(count: int) -> int:
    """Of all numbers together, over every first guess."""
    if count <= 0:
        return 0
    return min(count + fewest_turns(i) + fewest_turns(count - 1 - i) for i in range(count))


@pytest.mark.parametrize("name", ["learning", "learning_turns"])
def test_the_scripts_have_what_they_import(name: str) -> None:
    script = runpy.run_path(str(Path(turns.__file__).parents[1] / f"{name}.py"))
    assert script["Arguments"]().seeds == 5


def test_the_optimum_is_that_of_all_ways_to_guess() -> None:
    count = turns_settings.HIGH - turns_settings.LOW + 1
    assert turns_settings.optimum() == fewest_turns(count) / count


def test_settings_are_valid_and_have_what_they_are_compared_with() -> None:
    assert len(BY_NAME) == len(SETTINGS)
    for setting in SETTINGS:
        assert setting.against is None or setting.against in BY_NAME
        assert turns_settings.config(setting, seed=3).run.seed == 3
    with pytest.raises(UsageError, match="There is no setting 'game'"):
        turns_settings.jobs(("game",), 1, 1)
    [[job, _]] = turns_settings.jobs((CALCULATOR,), 2, 100)
    assert job.iterations == 25 and "calculator?digits=1" in job.changes


def test_a_demonstrated_game_is_played_by_its_rules() -> None:
    task = turns.make_bench(BY_NAME[TRAP]).task
    rng = np.random.default_rng(0)
    state = tiny.demonstrate(task, [task.prompts[0]] * 64, turns.guesser, rng)
    assert mdp.has_ended(state).all() and not state.truncated.any()
    own = mdp.own_mask(state, np)
    for i, length in enumerate(state.length):
        texts = [task.tokenizer.decode([token]) for token in state.tokens[i, 1:length].tolist()]
        guesses = [int(text) for text in texts if text.isdigit()]
        answers = [text for text in texts if text in ("higher", "lower")]
        assert len(guesses) == state.num_turns[i] <= turns_settings.TURNS
        low, high = turns_settings.LOW, turns_settings.HIGH
        for guess, answer in zip(guesses, answers, strict=False):
            low, high = (
                (max(low, guess + 1), high) if answer == "higher" else (low, min(high, guess - 1))
            )
        assert low <= high, "the answers contradict each other"
        is_answer = [text in ("higher", "lower") for text in texts]
        np.testing.assert_array_equal(own[i, 1:length], ~np.array(is_answer))


def test_a_wrong_guess_is_blamed_and_the_right_one_is_not() -> None:
    partner = turns.make_bench(BY_NAME[TRAP]).task.partner
    assert partner is not None
    blaming: Any = partner.interaction
    game = blaming._game
    turn = {"messages": [()], "rows": [{}], "turns": [1], "states": [None], "seeds": [5]}
    for guess in range(turns_settings.LOW, turns_settings.HIGH + 1):
        batch = turns.TurnBatch(completions=[str(guess)], completion_ids=[np.array([1])], **turn)
        [reply] = blaming.reply(batch)
        assert reply.reward == (0.0 if guess == game.number(5) else -0.5)


def test_a_pupil_who_calls_is_right_and_is_imitated() -> None:
    bench = turns.make_bench(BY_NAME[CALCULATOR])
    task, rng = bench.task, np.random.default_rng(0)
    caller = partial(turns.pupil, share_of_calls=1.0)
    prompts = [task.prompts[i] for i in range(64)]
    state = tiny.demonstrate(task, prompts, caller, rng)
    assert (state.num_turns == 2).all() and state.terminated.all()
    for tokens, start, end, prompt in zip(
        state.tokens, state.turn_start, state.length, prompts, strict=True
    ):
        question = prompt.row["messages"][0]["content"].removeprefix("What is ").rstrip("?")
        assert task.tokenizer.decode(tokens[start:end]) == str(calculator(question))
    network = tiny.make_network(task, 16, seed=0)

    def log_likelihood() -> float:
        logits = network(state.tokens, mdp.attention_mask(state, np))[0][:, :-1]
        chosen = np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), state.tokens[:, 1:, None], axis=-1
        )[..., 0]
        return float(chosen[mdp.own_mask(state, np)[:, 1:]].mean())

    before = log_likelihood()
    assert before == pytest.approx(-np.log(task.rules.vocab_size), abs=0.5)
    tiny.imitate(network, state, task, num_epochs=30, learning_rate=1e-2, rng=rng)
    assert log_likelihood() > before + 2


def test_tables_and_picture_say_what_the_records_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = []
    for setting in SETTINGS:
        for seed in range(3):
            worse = 1.0 if setting.name == TRAP else 0.0
            point = {"accuracy": 0.5, "turns": 2.0, "cut_off": 0.0, "used_tool": 0.1, "score": 0.5}
            end = point | {"accuracy": 0.9 - 0.5 * worse + 0.001 * rng.random(), "turns": 3 - worse}
            curve = [point | {"iteration": i} for i in range(4)]
            records.append({"name": setting.name, "seed": seed, "curve": curve, "end": end})
    turns_report.write(records, tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert "| the game, before | 0.50 ± 0.00 |" in tables
    assert f"| {TRAP} | 0.40 ± 0.00 | 0.50 ± 0.00 | 2.00 ± 0.00 |" in tables
    assert f"| paid each turn | {END} | " in tables
    assert "| and cut off -1 | wrong guess -0.5 | +0.50 [+0.50, +0.50]\\*\\* |" in tables
    assert (tmp_path / "turns.png").stat().st_size > 10_000
