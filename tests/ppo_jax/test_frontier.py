"""ppo-frontier: the best policies, and what a run has of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from ppo_jax import frontier
from ppo_jax.generation.optimum import share_of_gain
from ppo_jax.runs.curves import PANELS, draw_grid
from ppo_jax.runs.folder import read_records
from qwen_env.errors import UsageError

[gain_against_kl] = [panel for panel in PANELS if panel.title == "Gain against KL"]


@pytest.mark.usefixtures("rewards")
def test_a_run_against_the_best(finished_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--run", str(finished_run), "--samples", "16", "--batch-size", "32"]
    frontier.main([*argv, "--json"])
    found = json.loads(capfd.readouterr().out)
    metrics = [json.loads(x) for x in (finished_run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((finished_run / "config.json").read_text())
    assert found["num_prompts"] == 6
    reference, best, aim = found["reference"], found["best"], found["aim"]
    assert (reference["kl"], reference["effective_samples"]) == (0, pytest.approx(16))
    rewards = [reference["reward"], *(point["reward"] for point in best)]
    assert rewards == sorted(rewards)
    assert [point["kl"] for point in best] == pytest.approx(frontier.KLS[: len(best)])
    assert max(point["kl"] for point in best) < np.log(16)
    assert aim["beta"] == config["ppo"]["kl_coef"]
    last = metrics[-1]
    assert found["reached"]["reward"] == pytest.approx(last["objective/score"])
    share = share_of_gain(
        last["objective/score"], found["best_there"]["reward"], reference["reward"]
    )
    assert found["share_of_gain"]["reward"] == pytest.approx(share)
    # The curves are drawn against what was found, now and whenever they are drawn anew.
    records = read_records(finished_run)
    assert records.frontier == found
    [axis, *_] = draw_grid([(gain_against_kl, records)], columns=1).axes
    _, score, _ = (line for line in axis.get_lines() if line.get_linestyle() == "--")
    assert list(score.get_xdata()) == [0, *(point["kl"] for point in best)]
    first, spread = metrics[0]["objective/score"], metrics[0]["objective/score_std"]
    np.testing.assert_allclose(score.get_ydata(), (np.array(rewards) - first) / spread)
    (finished_run / "frontier.json").write_text("{")
    with pytest.raises(UsageError, match=r"frontier\.json is no JSON"):
        read_records(finished_run)
    (finished_run / "frontier.json").unlink()


@pytest.mark.usefixtures("rewards")
def test_before_any_training(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    keep = ("--model", "--prompts", "--eval-prompts", "--reward", "--max-new-tokens")
    argv = [x for i, x in enumerate(flags) if x in keep or (i and flags[i - 1] in keep)]
    frontier.main([*argv, "--samples", "8", "--kl-coef", "0.3"])
    table = capfd.readouterr().out
    assert "untrained" in table
    assert "aim of kl_coef" in table
    assert "the run" not in table


def test_a_truncated_reference_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        frontier.main(["--top-k", "5"])
    assert stop.value.code == 2
    assert "leave them out" in capfd.readouterr().err
