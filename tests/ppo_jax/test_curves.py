import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from ppo_jax import curves


def run(iterations: int, *, gold: bool = True) -> list[dict[str, Any]]:
    """A run like any other: noisy numbers, evaluations every ten iterations."""
    rng = np.random.default_rng(0)
    names = {line.metric for panel in curves.PANELS for line in panel.lines}
    training = sorted(n for n in names if not n.startswith("eval/") and (gold or "gold" not in n))
    held_out = sorted(n for n in names if n.startswith("eval/") and (gold or "gold" not in n))
    records = []
    for i in range(1, iterations + 1):
        record: dict[str, Any] = {"iteration": i} | {n: float(rng.random()) for n in training}
        if i % 10 == 0:
            record |= dict.fromkeys(held_out, 0.1 * i)
        records.append(record)
    records[0] |= dict.fromkeys((n.replace("eval/", "baseline/") for n in held_out), -0.5)
    return records


def draw(records: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes with something on them."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    curves.plot_curves(records, path)
    return [axis for axis in drawn[0].axes if axis.axison]


@pytest.mark.parametrize("iterations", [1, 6, 60])
def test_every_panel_is_drawn_and_none_is_empty(
    iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = draw(run(iterations), tmp_path / "curves.png", monkeypatch)
    assert [axis.get_title("left") for axis in axes] == [panel.title for panel in curves.PANELS]
    for axis in axes:
        assert any(len(line.get_xdata()) for line in axis.get_lines())
        assert axis.get_ylabel()
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert width > 1500
    assert height > 800
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_without_a_gold_score_there_is_no_panel_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = draw(run(20, gold=False), tmp_path / "curves.png", monkeypatch)
    assert len(axes) == len(curves.PANELS) - 1
    assert not any("Gold" in axis.get_title("left") for axis in axes)


def test_the_untrained_model_stands_at_iteration_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = draw(run(30), tmp_path / "curves.png", monkeypatch)[0]
    [held_out] = [line for line in score.get_lines() if line.get_label() == "held out, sampled"]
    assert list(held_out.get_xdata()) == [0, 10, 20, 30]
    np.testing.assert_allclose(held_out.get_ydata(), [-0.5, 1, 2, 3])


def test_what_was_not_finite_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = run(12)
    records[4]["objective/kl"] = None
    kl = draw(records, tmp_path / "curves.png", monkeypatch)[3]
    assert list(kl.get_lines()[0].get_xdata()) == [1, 2, 3, 4, *range(6, 13)]


def test_numbers_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No offset such as +1e5 above an axis, whatever the values."""
    records = run(12)
    for record in records:
        record["objective/kl"] = 100_000 + 1e-3 * record["iteration"]
    kl = draw(records, tmp_path / "curves.png", monkeypatch)[3]
    assert kl.yaxis.get_offset_text().get_text() == ""


def test_running_mean_is_centred_and_narrower_at_the_ends() -> None:
    y = [float(i * i) for i in range(30)]
    mean = curves._running_mean(y)
    assert math.isclose(mean[15], sum(y[11:20]) / 9)
    assert math.isclose(mean[0], sum(y[:5]) / 5)
    assert math.isclose(mean[-1], sum(y[-5:]) / 5)
