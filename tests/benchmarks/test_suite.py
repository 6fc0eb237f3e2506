"""The suite of benchmarks, on reports that are made up: what it runs, and what it makes of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ppo
import pytest
import suite

from ppo_jax import flags


def test_each_case_is_run_cold_and_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    caches: list[str] = []

    def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        commands.append(command)
        caches.append(environment["JAX_COMPILATION_CACHE_DIR"])
        is_cold = len(commands) % 2
        phases = {"rollout": 1.0, "update": 1.5, "iteration": 2.5}
        timed = {"seconds": phases, "times_its_floor": phases, "tokens_per_s": 1234.0}
        return {suite.UNTIL: 20.0 if is_cold else 9.0, **(timed if is_cold else {})}

    output = tmp_path / "suite.json"
    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(sys, "argv", ["suite.py", "--machine", "tiny", "--output", str(output)])
    monkeypatch.setenv("COLUMNS", "200")
    suite.main()
    results = json.loads(output.read_text())
    said = capsys.readouterr().out
    assert list(results) == ["tiny", "tiny, packed"]
    for name, report in results.items():
        assert (report["cold_start_s"], report["warm_start_s"]) == (17.5, 6.5)
        [row] = [line for line in said.splitlines() if line.startswith(f"│ {name} ")]
        shown = [cell.strip() for cell in row.strip("│").split("│")]
        assert shown == [name, "1.00", "1.50", "2.50", "2.50", "1.50", "1,234", "", "17.50", "6.50"]
    counts = [command[command.index("--iterations") + 1] for command in commands]
    assert counts == ["2", "0"] * 2
    plain, packed = (flags.parse(ppo.Work(), commands[i][2:], prog="ppo.py") for i in (0, 2))
    tiny = ppo.Work("random:tiny", iterations=2, json=True)
    assert plain == replace(tiny, decode_batches=(1, 4))
    assert packed == replace(tiny, batch_size=16, mean_response_length=8, packed_sizes=2)
    assert caches[0] == caches[1] != caches[2] == caches[3]
