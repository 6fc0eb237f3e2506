"""The benchmark for a GPU, at sizes that a CPU can do."""

import json
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import suite
from ppo import SHAPES


def report_of(work: gpu.Work) -> dict[str, Any]:
    """Made up: a machine of 1 TFLOP/s and 1000 GB/s."""
    return {
        "device": "a GPU",
        "work": gpu.asdict(work),
        "seconds": {"rollout": 2.0, "update": 4.0, "iteration": 6.5},
        "times_its_floor": {"rollout": 1.25, "update": 2.5, "iteration": 2.0},
        "matmul_gflops": 1e3,
        "read_gb_per_s": 1e3,
        "tokens_per_s": 1234.0,
        "peak_memory_gib": 3.0,
        "decode": [{"batch_size": n, "generated_tokens_per_s": 100.0} for n in work.decode_batches],
    }


def test_what_is_said_of_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second work finds no time."""
    limits: list[float] = []

    def run(command: list[str], environment: dict[str, str], timeout: float) -> dict[str, Any]:
        limits.append(timeout)
        if "--mean-response-length" in command:
            raise gpu.subprocess.TimeoutExpired(command, timeout)
        return report_of(gpu.works(gpu.Arguments("tiny"))[0])

    monkeypatch.setattr(suite, "run", run)
    output = tmp_path / "gpu.json"
    arguments = ["gpu.py", "--size", "tiny", "--minutes", "5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    said = capsys.readouterr().out
    assert "1.0 TFLOP/s" in said and "1000 GB/s" in said and "given up" in said
    assert "4 x (12 + 8 of 32) ..." in said
    assert 290 < limits[1] <= limits[0] <= 300
    [report] = json.loads(output.read_text())

    [line] = [line for line in said.splitlines() if line.startswith("│ 2 ")]
    shape, work = SHAPES["random:tiny"], gpu.works(gpu.Arguments("tiny"))[0]
    seconds = 2 * 32 / 100
    lengths = [(24, 32)] * 2
    floor = gpu.floor_seconds(shape, work, lengths, 1e12, 1e12)["rollout"]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["2", "100", "20.00", f"{seconds / floor:.2f}"]

    [line] = [line for line in said.splitlines() if line.startswith("│ 4 x (24 + 32) ")]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[1:7] == ["2.00", "1.25", "4.00", "0.40", "1,234", "3.0"]
    # In float32: parameters, two moments and gradients of all numbers, a reference without the
    # value head's 33, and of 4 x 56 tokens in two layers 256 numbers each.
    count = sum(x.size for x in gpu.jax.tree.leaves(gpu.Iteration(work).params))
    least = 4 * (5 * count - 33) + 4 * 4 * 56 * 2 * 256
    assert float(cells[7]) == pytest.approx(3 * 2**30 / least, rel=1e-3)
    assert report["work"]["decode_batches"] == [1, 2]


@pytest.mark.slow
def test_a_tiny_work_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    [work, _] = gpu.works(gpu.Arguments("tiny"))
    monkeypatch.setattr(gpu, "works", lambda _: [work])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--size", "tiny", "--output", str(output)])
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    gpu.main()
    [report] = json.loads(output.read_text())
    assert [row["batch_size"] for row in report["decode"]] == [1, 2]
    said = capsys.readouterr().out
    assert "│ 4 x (24 + 32) " in said
    assert "given up" not in said
