"""The runs on long answers: the task, and what is made of the records."""

from pathlib import Path

import numpy as np
import pytest
from learning import long_answers, long_answers_report, long_answers_settings
from learning.long_answers_settings import BY_NAME, ENOUGH, GROUP, LENGTH, PPO, SETTINGS
from scipy import stats

from qwen_env.errors import UsageError
from qwen_env.rewards import RewardBatch


def batch_of(prompts: list[str], completions: list[str]) -> RewardBatch:
    nothing = [np.array([0])] * len(prompts)
    rows = [{"prompt": prompt} for prompt in prompts]
    return RewardBatch(prompts, completions, nothing, nothing, rows, ["length"] * len(prompts))


def test_enough_good_symbols_are_paid_whichever_they_are() -> None:
    good = "02468acegikmoqsuwy"
    bad = sorted(set(long_answers.SYMBOLS) - set(good))[0]
    answers = [(good * 4)[:n] + bad * (LENGTH - n) for n in (0, ENOUGH - 1, ENOUGH, LENGTH)]
    answers.append(answers[2][::-1])
    score, parts = long_answers.enough_are_good(batch_of(["3"] * 5, answers))
    np.testing.assert_array_equal(score, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(parts["accuracy"], score)
    counts = np.array([0, ENOUGH - 1, ENOUGH, LENGTH, ENOUGH])
    np.testing.assert_allclose(parts["good"], counts / LENGTH, rtol=1e-6)


def test_chance_is_paid_about_once_in_a_hundred() -> None:
    """The upper end of a binomial distribution."""
    assert 0.005 < stats.binom.sf(ENOUGH - 1, LENGTH, 0.5) < 0.015


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
            end = {"accuracy": 0.5 + 0.01 * seed, "good": 0.9}
            records.append({"name": name, "seed": seed, "curve": curve, "end": end})
    long_answers_report.write(records, tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    # Five iterations up to the tenth, and up to the twentieth.
    for name, same_time, seconds in ((PPO, "0.070", "2.00"), (GROUP, "0.170", "1.00")):
        row = next(line for line in tables.splitlines() if line.startswith(f"| {name} | 0.5"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[3].startswith(same_time) and cells[6].startswith(seconds)
    assert (tmp_path / "long_answers.png").stat().st_size > 10_000
