"""The runs on long answers: the task, its player, and what is made of the records."""

from pathlib import Path

import numpy as np
import pytest
from learning import long_answers, long_answers_report, long_answers_settings, tiny
from learning.long_answers_settings import BY_NAME, GROUP, LENGTH, MISTAKES, PPO, SETTINGS

from qwen_env.errors import UsageError
from qwen_env.rewards import RewardBatch


def counted(number: int, length: int) -> list[int]:
    numbers = [number]
    for _ in range(length):
        numbers.append(numbers[-1] + 7 if numbers[-1] < 29 else numbers[-1] - 29)
    return numbers[1:]


def text(numbers: list[int]) -> str:
    return "".join("0123456789abcdefghijklmnopqrstuvwxyz"[number] for number in numbers)


def batch_of(prompts: list[str], completions: list[str]) -> RewardBatch:
    nothing = [np.array([0])] * len(prompts)
    rows = [{"prompt": prompt} for prompt in prompts]
    return RewardBatch(prompts, completions, nothing, nothing, rows, ["length"] * len(prompts))


def test_the_last_symbol_alone_is_paid() -> None:
    right = text(counted(3, LENGTH))
    mended = right[:9] + right[3:] + "0" * 6
    wrong = right[:-1] + right[0]
    answers = [right, "0" * (LENGTH - 1) + right[-1], wrong, mended, ""]
    score, parts = long_answers.last_symbol(batch_of(["3"] * 5, answers))
    np.testing.assert_array_equal(score, [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(parts["accuracy"], score)
    expected = [1, 0, (LENGTH - 1) / LENGTH]
    np.testing.assert_allclose(parts["right_steps"][:3], expected, rtol=1e-6)
    assert parts["right_steps"][4] == 0


def test_the_player_makes_so_many_mistakes() -> None:
    bench = long_answers.make_bench(BY_NAME[PPO])
    task, rng = bench.task, np.random.default_rng(0)
    prompts = [task.prompts[i] for i in rng.integers(0, 36, 512)]
    state = tiny.demonstrate(task, prompts, long_answers.player, rng)
    assert (state.length == 1 + LENGTH).all()
    answers = [task.tokenizer.decode(tokens[1:].tolist()) for tokens in state.tokens]
    numbers = [str(prompt.row["prompt"]) for prompt in prompts]
    score, parts = long_answers.last_symbol(batch_of(numbers, answers))
    share = MISTAKES * 35 / 36  # any symbol is the right one now and then
    assert parts["right_steps"].mean() == pytest.approx(1 - share, abs=4e-3)
    assert score.mean() == pytest.approx((1 - share) ** LENGTH + 1 / 36, abs=0.06)


def test_settings_are_valid_and_have_what_they_are_compared_with() -> None:
    assert len(BY_NAME) == len(SETTINGS)
    for setting in SETTINGS:
        assert setting.against is None or setting.against in BY_NAME
        assert long_answers_settings.config(setting, seed=3).run.seed == 3
    with pytest.raises(UsageError, match="There is no setting 'PPG'"):
        long_answers_settings.jobs(("PPG",), 1, 1)


def test_at_equal_time_the_slower_one_is_asked_earlier(tmp_path: Path) -> None:
    records = []
    for name, seconds in ((PPO, 2.0), (GROUP, 1.0)):
        for seed in range(3):
            curve = [{"accuracy": i / 100, "time/iteration_s": seconds} for i in range(20)]
            end = {"accuracy": 0.5 + 0.01 * seed, "right_steps": 0.9}
            records.append({"name": name, "seed": seed, "curve": curve, "end": end})
    long_answers_report.write(records, tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    # Five iterations up to the tenth, and up to the twentieth.
    for name, same_time, seconds in ((PPO, "0.070", "2.00"), (GROUP, "0.170", "1.00")):
        row = next(line for line in tables.splitlines() if line.startswith(f"| {name} | 0.5"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[3].startswith(same_time) and cells[6].startswith(seconds)
    assert (tmp_path / "long_answers.png").stat().st_size > 10_000
