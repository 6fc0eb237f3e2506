"""The processes are stood in for by a function that writes what a run leaves."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from ppo_jax import sweep
from ppo_jax.runs.comparison import compare
from ppo_jax.runs.interruption import EXIT_STATUS
from ppo_jax.sweep import main

ITERATIONS = 6


class Processes:
    """Counts the runs; each writes metrics that depend on its flags and its seed alone."""

    def __init__(self, config: Path) -> None:
        self.modules: list[str] = []
        self.words: list[list[str]] = []
        self.config = config
        self.statuses: dict[int, int] = {}  # by number of the run, from 1, if it does not end well

    def __call__(self, command: list[str]) -> "Processes":
        assert command[:2] == [sys.executable, "-m"]
        self.modules.append(command[2])
        self.words.append(command[3:])
        return self

    def wait(self) -> int:
        words = self.words[-1]
        folder = Path(words[words.index("--output-dir") + 1])
        folder.mkdir(exist_ok=True)
        shutil.copy(self.config, folder / "config.json")
        if status := self.statuses.get(len(self.words), 0):
            return status
        rate = float(words[words.index("--learning-rate") + 1]) if "--learning-rate" in words else 0
        score = rate + 0.1 * int(words[words.index("--seed") + 1])
        lines = [
            {
                "iteration": i,
                "objective/score": score * i,
                "policy/entropy": None,
                **({"eval/sampled/score": score * i} if i % 3 == 0 else {}),
            }
            for i in range(1, ITERATIONS + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / "final").mkdir()
        return 0


@pytest.fixture
def processes(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    processes = Processes(finished_run / "config.json")
    monkeypatch.setattr(sweep.subprocess, "Popen", processes)
    return processes


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.txt"
    path.write_text("plain\n\n# faster\nfast --learning-rate 1  # much\n")
    return path


def test_every_setting_with_every_seed(
    processes: Processes, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    argv = ["--output-dir", str(folder), "--seeds", "0", "1", "2", "--settings", str(settings)]
    main([*argv, "--", "--preset", "pocket", "--kl-coef", "0.1"])
    assert [words[4:] for words in processes.words] == [
        [*own, "--seed", str(seed), "--output-dir", str(folder / f"{name}-seed{seed}")]
        for seed in (0, 1, 2)
        for name, own in (("plain", []), ("fast", ["--learning-rate", "1"]))
    ]
    assert set(processes.modules) == {"ppo_jax.train"}
    assert all(w[:4] == ["--preset", "pocket", "--kl-coef", "0.1"] for w in processes.words)
    page = (folder / "sweep.md").read_text()
    half = stats.t.ppf(0.975, 2) * np.std([0, 0.6, 1.2], ddof=1) / np.sqrt(3)
    assert f"| plain | 3 | 0.60 ± {half:.2f} |" in page
    assert f"| fast | 3 | 6.60 ± {half:.2f} (Δ +6.00 ± 0.00**) |" in page
    assert "6.60" in capsys.readouterr().out
    assert imread(folder / "sweep.png").std() > 0.05
    before = len(processes.words)
    main([*argv, "--", "--preset", "pocket", "--kl-coef", "0.1"])
    assert len(processes.words) == before, "all are done"


def test_of_another_command(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--output-dir", str(tmp_path / "sweep"), "--seeds", "0", "--command", "ppo-sft", "--"]
    main([*argv, "--num-epochs", "1"])
    assert processes.modules == ["ppo_jax.sft"]
    with pytest.raises(SystemExit):
        main([*argv, "--preset", "pocket"])
    assert "error: Unrecognized arguments: --preset" in capsys.readouterr().err


def test_an_interrupted_sweep_goes_on(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    argv = ["--output-dir", str(folder), "--seeds", "4", "5"]
    processes.statuses = {2: EXIT_STATUS, 3: 2}
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == EXIT_STATUS
    assert "--resume" not in processes.words[1]
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert f"The run in {folder}/run-seed5 ended with status 2" in capsys.readouterr().err
    main(argv)
    assert [words[-1] == "--resume" for words in processes.words] == [False, False, True, True]
    assert not (folder / "sweep.md").read_text().count("Δ +")
    with pytest.raises(SystemExit):
        main([*argv, "--", "--kl-coef", "0.2"])
    assert "run-seed4 was begun with other flags" in capsys.readouterr().err
    main(["--output-dir", str(folder), "--seeds", "4", "6"])
    assert len(processes.words) == 5, "another seed is one run more"


def test_differences_are_of_seeds_that_both_have() -> None:
    def run(score: float) -> list[dict[str, Any]]:
        return [{"iteration": 1, "objective/kl": score}]

    rows = compare({"a": {0: run(1), 1: run(2), 2: run(9)}, "b": {0: run(3), 1: run(5)}})
    assert [row.num_seeds for row in rows] == [3, 2]
    assert rows[0].cells["objective/kl"].difference is None
    difference = rows[1].cells["objective/kl"].difference
    assert difference is not None
    assert difference.mean == 2.5
    assert rows[1].cells["objective/kl"].verdict == "noise"
    [row] = compare({"a": {0: run(1)}})
    assert str(row.cells["objective/kl"]) == "1.00", "one seed has no interval"


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        (["--seeds"], None, "There is no seed"),
        (["--seeds", "1", "1"], None, "Seed 1 stands there twice"),
        (["--", "--seed", "3"], None, "--seed is what the sweep says itself"),
        (["--", "--kl-coef", "-1"], None, "kl_coef is -1"),
        ([], "a\na --chat\n", "line 2 of .* is named 'a'"),
        ([], "--chat\n", "line 1 of .* begins with '--chat'"),
        ([], "# nothing\n", "has no setting"),
        ([], "a 'b\n", "line 1 of .* cannot be read"),
        ([], "a --no-such-flag 3\n", "--no-such-flag"),
    ],
)
def test_bad_input(
    argv: list[str],
    text: str | None,
    message: str,
    processes: Processes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "sweep"
    if text is not None:
        (tmp_path / "settings.txt").write_text(text)
        argv = ["--settings", str(tmp_path / "settings.txt"), *argv]
    with pytest.raises(SystemExit) as exit:
        main(["--output-dir", str(folder), *argv])
    assert exit.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not processes.words
    assert not folder.exists()
