"""The suite of benchmarks, on works so small that only its parts are tried."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[2] / "benchmarks" / "suite.py"


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    output = tmp_path / "suite.json"
    command = [sys.executable, str(SUITE), "--machine", "tiny", "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    results = json.loads(output.read_text())
    assert list(results) == ["tiny", "tiny, packed"]
    for name, report in results.items():
        assert name in done.stdout
        assert report["times_its_floor"].keys() == {"rollout", "update", "iteration"}
        assert min(report["times_its_floor"].values()) > 1
        assert report["tokens_per_s"] > 0 and report["peak_memory_gib"] > 0.1
        assert report["cold_start_s"] > 0 and report["warm_start_s"] > 0
    assert [row["batch_size"] for row in results["tiny"]["decode"]] == [1, 4]
