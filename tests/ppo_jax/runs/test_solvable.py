"""--keep-solvable: what is measured, kept and read back, and that it is measured once."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from ppo_jax.agent import PPOAgent
from ppo_jax.config import preset
from ppo_jax.runs import solvable
from ppo_jax.runs.folder import RunFolder
from ppo_jax.runs.ppo import PPOTrainer
from ppo_jax.runs.solvable import kept, read_rates
from ppo_jax.train import main
from qwen_env.errors import UsageError
from qwen_env.prompts import Prompt, PromptDataset

LIMITS = "0.3", "0.7"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer to draw than the rest of such a small run."""
    monkeypatch.setattr(RunFolder, "plot", lambda self: self.path / "curves.png")


@pytest.fixture
def argv(flags: list[str], tmp_path: Path) -> list[str]:
    words = [*flags, "--reward", "rewards_of_tests:verified", "--num-iterations", "2"]
    words += ["--batch-size", "2", "--keep-solvable", *LIMITS]
    return [*words, "--output-dir", str(tmp_path / "run")]


@pytest.fixture
def asked(rewards: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Each call of the reward: prompts and accuracy."""
    calls: list[dict[str, Any]] = []
    verified = rewards.verified

    def record(batch: Any) -> Any:
        scores, components = verified(batch)
        calls.append({"prompts": list(batch.prompts), "accuracy": components["accuracy"].tolist()})
        return scores, components

    monkeypatch.setattr(rewards, "verified", record)
    return calls


def fails(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    return error


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {name: x for name, x in json.loads(line).items() if not name.startswith(("time", "thr"))}
        for line in lines
    ]


class NoRun:
    """Stands for a run that is not even begun."""

    agents: ClassVar[list[PPOAgent]] = []

    def __init__(self, trainer: PPOTrainer, *_: Any):
        self.agents.append(trainer.agent)

    def go(self, *, resume: bool) -> None:
        assert not resume


def test_what_is_measured(
    argv: list[str],
    inputs: Path,
    asked: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Six prompts, one at a time, eight answers each."""
    monkeypatch.setattr("ppo_jax.train.Run", NoRun)
    monkeypatch.setattr(NoRun, "agents", [])
    main(argv)
    lines = (inputs / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    [nothing, *tries] = asked
    assert len(nothing["prompts"]) == 1, "an empty answer"
    assert [call["prompts"] for call in tries] == [[prompt] * 8 for prompt in prompts]
    rates = [float(np.mean(call["accuracy"])) for call in tries]
    assert json.loads((tmp_path / "run" / "solvable.json").read_text()) == {
        "samples": 8,
        "seed": 0,
        "rates": {str(i): rate for i, rate in enumerate(rates)},
    }
    low, high = map(float, LIMITS)
    solved = [prompt for prompt, rate in zip(prompts, rates, strict=True) if low <= rate <= high]
    assert 1 < len(solved) < 6
    [agent] = NoRun.agents
    assert [prompt.text for prompt in agent.task.prompts] == solved
    below = sum(rate < low for rate in rates)
    assert (
        f"Kept {len(solved)} of 6 prompts: those that the untrained model answers right in 30 to "
        f"70 % of its tries ({below} are below, {6 - below - len(solved)} above)."
    ) in capfd.readouterr().err


@pytest.mark.slow
def test_is_measured_once(
    argv: list[str],
    asked: list[dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    untouched: Callable[[Path], AbstractContextManager[None]],
) -> None:
    main([*argv, "--save-every", "1", "--keep-checkpoints", "9"])
    run = tmp_path / "run"
    # Measuring, an evaluation before training and one at the end, and between them two iterations.
    assert len(asked) == 7 + 4 + 2 + 4
    trained_on = {prompt for call in asked[11:13] for prompt in call["prompts"]}
    assert len(trained_on) == 3
    # Back to the first iteration: nothing is measured again.
    whole, before = metrics(run), (run / "solvable.json").read_bytes()
    shutil.rmtree(run / "checkpoints" / "2")
    asked.clear()
    main(["--output-dir", str(run), "--resume"])
    assert metrics(run) == whole
    assert (run / "solvable.json").read_bytes() == before
    assert len(asked) == 1 + 4
    assert "Kept 3 of 6 prompts" in capfd.readouterr().err
    # What the run is trained on must not change.
    again = ["--output-dir", str(run), "--resume", "--num-iterations", "3"]
    written = json.loads(before)
    for changed, words in (
        (written | {"rates": dict.fromkeys(written["rates"], 0.5)}, "does not hold the prompts"),
        ({"rates": {"0": 0.5}}, "solvable.json has no rate of prompt 1; put"),
        (None, "solvable.json is gone"),
    ):
        (run / "solvable.json").unlink()
        if changed is not None:
            (run / "solvable.json").write_text(json.dumps(changed))
        with untouched(run):
            assert words in fails(again, capfd)
        (run / "solvable.json").write_bytes(before)
    error = fails([*again, "--keep-solvable", "0", "1"], capfd)
    assert "holds a run with keep_solvable = [0.3, 0.7], not [0.0, 1.0]" in error


def test_what_is_refused(
    argv: list[str], rewards: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left, so that the next start is not blocked."""
    error = fails([*argv, "--reward", "rewards_of_tests:count_e"], capfd)
    assert "rewards_of_tests.count_e reports no component 'accuracy' (only score, gold)" in error
    error = fails([*argv, "--keep-solvable", "1", "1"], capfd)
    assert "keep_solvable is 1 1, but of 6 prompts the untrained model answers 0 that" in error
    assert "(6 are below, 0 above), and a batch has 2; widen keep_solvable" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["0.7", "0.3"], "keep_solvable is 0.7 0.3; the first limit must not be above the second."),
        (["0.3"], "keep_solvable is (0.3,); it must be 2 values, or None."),
        ([], "keep_solvable is (); it must be 2 values, or None."),
        (["0.1", "0.2", "0.3"], "keep_solvable is (0.1, 0.2, 0.3); it must be 2 values, or None."),
        (["-1", "1"], "keep_solvable[0] is -1.0; it must be between 0 and 1."),
        (["0", "nan"], "keep_solvable[1] is nan; it must be between 0 and 1."),
        (["0", "None"], "keep_solvable[1] is None; it must be a number."),
        (["low", "high"], "Argument --keep-solvable: invalid float value: 'low'"),
    ],
)
def test_what_is_no_range(
    words: list[str], sentence: str, argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert sentence in fails([*argv, "--keep-solvable", *words], capfd)


def test_an_interrupted_start_measures_again(
    argv: list[str],
    asked: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By Ctrl-C, which leaves nothing, or a kill, which leaves files but no run."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(solvable, "write_json", interrupt)
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 130
    assert not run.exists()
    monkeypatch.setattr("ppo_jax.train.Run", NoRun)
    run.mkdir()
    for left in ("solvable.json", "solvable.json.partial"):
        (run / left).write_text("{")
    asked.clear()
    main(argv)
    assert len(asked) == 7
    assert len(json.loads((run / "solvable.json").read_text())["rates"]) == 6
    assert [path.name for path in run.iterdir()] == ["solvable.json"]


RATES = {0: 0.0, 2: 0.25, 3: 0.5, 7: 0.75, 8: 1.0}
PROMPTS = PromptDataset([Prompt(f"{i}", np.array([i]), {}, i) for i in RATES], num_dropped=4)


@pytest.mark.parametrize(
    ("limits", "indices", "others"),
    [
        ((0.0, 1.0), [0, 2, 3, 7, 8], "0 are below, 0 above"),
        ((0.25, 0.75), [2, 3, 7], "1 are below, 1 above"),
        ((0.26, 1.0), [3, 7, 8], "2 are below, 0 above"),
        ((0.5, 0.5), [3], "2 are below, 2 above"),
    ],
)
def test_what_is_kept(limits: tuple[float, float], indices: list[int], others: str) -> None:
    """Both limits are within the range; what was dropped for its length stays counted."""
    config = preset("pocket")
    config = replace(
        config,
        task=replace(config.task, keep_solvable=limits),
        ppo=replace(config.ppo, batch_size=1),
    )
    chosen, said = kept(PROMPTS, RATES, config)
    assert [prompt.index for prompt in chosen] == indices
    assert chosen.num_dropped == 4
    assert said.startswith(f"Kept {len(indices)} of 5 prompts: ")
    assert others in said
    config = replace(config, ppo=replace(config.ppo, batch_size=6, completions_per_prompt=1))
    with pytest.raises(UsageError, match=f"answers {len(indices)} that often .* a batch has 6"):
        kept(PROMPTS, RATES, config)


@pytest.mark.parametrize("content", ["[]", "{", '{"rates": []}', '{"rates": {"0": "0.5"}}'])
def test_damaged_rates(content: str, tmp_path: Path) -> None:
    path = tmp_path / "solvable.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"solvable\.json"):
        read_rates(path, PROMPTS)


def test_an_agent_without_a_folder_cannot_measure() -> None:
    config = preset("pocket")
    config = replace(config, task=replace(config.task, keep_solvable=(0.1, 0.9)))
    with pytest.raises(UsageError, match="keep_solvable is measured in a run's folder"):
        PPOAgent.from_config(config)
