import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from ppo_jax.generation.intervals import wilson_interval
from ppo_jax.runs import curves, panels
from ppo_jax.runs.curves import PANELS
from ppo_jax.runs.panels import HeatPanel, Line, PathPanel, Records

LIMIT = 12  # tokens of a response


def metrics_of(panel: Any) -> list[Line]:
    if isinstance(panel, HeatPanel):
        return []
    return [*panel.lines, *([panel.x] if isinstance(panel, PathPanel) else [])]


def run(iterations: int, *, gold: bool = True) -> Records:
    """A run like any other: noisy numbers, evaluations every ten iterations."""
    rng = np.random.default_rng(0)
    lines = [line for panel in PANELS for line in metrics_of(panel)]
    names = {line.metric for line in lines} | {line.unit for line in lines if line.unit}
    names = {name for name in names if gold or "gold" not in name}
    training = sorted(name for name in names if not name.startswith("eval/"))
    held_out = sorted(name for name in names if name.startswith("eval/"))
    counts = {line.trials for line in lines if line.trials}
    records = []
    for i in range(1, iterations + 1):
        record: dict[str, Any] = {"iteration": i} | {n: float(rng.random()) for n in training}
        if i % 10 == 0:
            record |= dict.fromkeys(held_out, 0.1 * i) | dict.fromkeys(counts, 64)
        records.append(record)
    records[0] |= dict.fromkeys((n.replace("eval/", "baseline/") for n in held_out), -0.5)
    records[0] |= dict.fromkeys((n.replace("eval/", "baseline/") for n in counts), 16)
    return Records(records, [distributions(i) for i in range(1, iterations + 1)])


def distributions(iteration: int) -> dict[str, Any]:
    """32 responses; none has the last length, one the one before it."""
    return {
        "iteration": iteration,
        "ratio": [0] * 19 + [30, 60, 10] + [0] * 18,
        "advantage": [1] * 40,
        "length": [1] * (LIMIT - 2) + [22, 0],
        "kl_by_position": [0.1 * i for i in range(LIMIT - 1)] + [None],
        "entropy_by_position": [1.0] * (LIMIT - 1) + [None],
    }


def panel(title: str) -> Any:
    [found] = [panel for panel in PANELS if panel.title == title]
    return found


def draw(records: Records, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """The axes with something on them, by title."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    curves.plot_curves(records, path)
    return {axis.get_title("left"): axis for axis in drawn[0].axes if axis.axison}


def draw_one(title: str, records: Records) -> Axes:
    [axis] = curves.draw_grid([(panel(title), records)], columns=1).axes
    return axis


@pytest.mark.parametrize("iterations", [1, 60])
def test_every_panel_is_drawn_and_none_is_empty(
    iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = draw(run(iterations), tmp_path / "curves.png", monkeypatch)
    one = iterations == 1  # in which nothing changes
    expected = [p for p in PANELS if not (one and getattr(p, "only_if_it_changes", False))]
    assert list(axes) == [panel.title for panel in expected]
    for axis, panel in zip(axes.values(), expected, strict=True):
        assert axis.get_ylabel()
        assert axis.get_xlabel()
        if isinstance(panel, HeatPanel):
            [image] = axis.get_images()
            assert np.ma.count(image.get_array()) > 0
        else:
            assert any(len(line.get_xdata()) for line in axis.get_lines())
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert width > 1500
    assert height > 1300
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_titles_differ() -> None:
    assert len({panel.title for panel in PANELS}) == len(PANELS)


def known(records: Records) -> set[str]:
    return {panel.title for panel in PANELS if panel.is_known(records)}


def test_panels_without_data_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = known(run(20))
    assert len(everything) == len(PANELS)
    gone = {"Gold score, never trained on", "Gain of score and gold score"}
    assert everything - known(run(20, gold=False)) == gone
    # A run that an older version began has no distributions.
    gone = {panel.title for panel in PANELS if isinstance(panel, HeatPanel)}
    assert everything - known(Records(run(20).metrics)) == gone
    assert draw(Records([]), tmp_path / "curves.png", monkeypatch) == {}


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("objective/kl_coef", "KL coefficient"),
        ("update/epochs", "Epochs before an early stop"),
    ],
)
def test_what_never_changes_needs_no_panel(metric: str, title: str) -> None:
    records = run(20)
    for record in records.metrics:
        record[metric] = 4.0
    assert not panel(title).is_known(records)
    records.metrics[7][metric] = 2.5
    assert panel(title).is_known(records)


def test_the_untrained_model_stands_at_iteration_0() -> None:
    axis = draw_one("Score", run(30))
    [held_out] = [line for line in axis.get_lines() if line.get_label() == "held out, sampled"]
    assert list(held_out.get_xdata()) == [0, 10, 20, 30]
    np.testing.assert_allclose(held_out.get_ydata(), [-0.5, 1, 2, 3])


def test_accuracy_comes_first_and_with_intervals() -> None:
    """Wilson's, of 16 prompts before training and of 64 later."""
    assert PANELS[0].title == "Accuracy"
    records = run(20)
    for record, share in ((records.metrics[9], 0.25), (records.metrics[19], 0.5)):
        record["eval/greedy/accuracy"] = share  # type: ignore[index]
    records.metrics[0]["baseline/greedy/accuracy"] = 0.0  # type: ignore[index]
    axis = draw_one("Accuracy", records)
    [_, greedy] = axis.collections  # behind the curves of the sampled and of the greedy answers
    [path] = greedy.get_paths()
    ends = np.unique(np.round(path.vertices, 9), axis=0).tolist()
    shares = ((0, 0.0, 16), (10, 0.25, 64), (20, 0.5, 64))
    expected = [[i, round(end, 9)] for i, p, n in shares for end in wilson_interval(p, n)]
    assert ends == expected
    assert axis.get_ylim()[0] == 0


def test_no_interval_without_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs that another version recorded; and a run without accuracy has no such panel."""
    records = run(20)
    for record in records.metrics:
        record.pop("eval/num_prompts", None)  # type: ignore[attr-defined]
        record.pop("baseline/num_prompts", None)  # type: ignore[attr-defined]
    assert not draw_one("Accuracy", records).collections
    for record in records.metrics:
        record.pop("reward/accuracy")  # type: ignore[attr-defined]
    assert next(iter(draw(records, tmp_path / "curves.png", monkeypatch))) == "Score"


def test_what_was_not_finite_is_left_out() -> None:
    records = run(12)
    records.metrics[4]["objective/kl"] = None
    axis = draw_one("KL from the reference model", records)
    assert list(axis.get_lines()[0].get_xdata()) == [1, 2, 3, 4, *range(6, 13)]
    [score, _] = draw_one("Gain against KL", records).collections
    assert len(score.get_offsets()) == 11


def test_numbers_are_written_out() -> None:
    """No offset such as +1e5 above an axis, whatever the values."""
    records = run(12)
    for record in records.metrics:
        record["objective/kl"] = 100_000 + 1e-3 * record["iteration"]
    axis = draw_one("KL from the reference model", records)
    axis.figure.canvas.draw()
    assert axis.yaxis.get_offset_text().get_text() == ""


def test_gains_begin_at_0_and_are_in_units_of_the_first_deviation() -> None:
    records = run(5)
    for record in records.metrics:
        i = record["iteration"]
        record |= {"objective/score": 3.0 + i, "reward/gold": -i / 2}
        record |= {"objective/score_std": 2.0 / i, "reward/gold_std": 0.25 * i}
    gold, score = draw_one("Gain of score and gold score", records).get_lines()
    np.testing.assert_allclose(score.get_ydata(), [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(gold.get_ydata(), [0, -2, -4, -6, -8])
    for record in records.metrics:
        record["objective/kl"] = 0.1 * record["iteration"]
    gold_points, score_points = draw_one("Gain against KL", records).collections
    kl = [0.1, 0.2, 0.3, 0.4, 0.5]
    np.testing.assert_allclose(score_points.get_offsets(), np.c_[kl, [0, 0.5, 1, 1.5, 2]])
    np.testing.assert_allclose(gold_points.get_offsets(), np.c_[kl, [0, -2, -4, -6, -8]])
    assert list(score_points.get_array()) == [1, 2, 3, 4, 5], "coloured by iteration"


def test_a_first_batch_without_spread_gives_no_unit() -> None:
    records = run(5)
    records.metrics[0]["reward/gold_std"] = 0.0
    assert not panel("Gain of score and gold score").is_known(records)
    records.metrics[0]["objective/score_std"] = None
    assert not panel("Gain against KL").is_known(records)


def heat(title: str, records: Records) -> tuple[np.ndarray, Axes]:
    axis = draw_one(title, records)
    [image] = axis.get_images()
    return np.ma.filled(image.get_array(), np.nan), axis


def test_counts_are_drawn_as_shares_at_their_iterations() -> None:
    records = run(9)
    del records.distributions[3]  # type: ignore[attr-defined]
    ratio, axis = heat("Ratio of new to old probability", records)
    assert ratio.shape == (40, 9)
    np.testing.assert_allclose(ratio[19:22, 0], [0.3, 0.6, 0.1])
    assert np.isnan(ratio[:19]).all(), "nothing is white, not the lowest colour"
    assert np.isnan(ratio[:, 3]).all()
    assert np.isfinite(ratio[20, [2, 4, 8]]).all()
    assert axis.get_images()[0].get_extent() == [0.5, 9.5, 0, 2]
    lengths, axis = heat("Response lengths of a batch", records)
    assert axis.get_images()[0].get_extent() == [0.5, 9.5, 0.5, LIMIT + 0.5]
    np.testing.assert_allclose(np.nansum(lengths, axis=0)[[0, 8]], 1)


def test_the_ratio_is_drawn_with_the_limits_of_its_clip() -> None:
    records = run(3)._replace(clip_limits=(0.9, 1.28))
    _, axis = heat("Ratio of new to old probability", records)
    assert [line.get_ydata()[0] for line in axis.get_lines()] == [0.9, 1.28]


def test_means_that_few_responses_stand_behind_are_left_out() -> None:
    records = run(2)
    entropy, _ = heat("Entropy, by position", records)
    np.testing.assert_array_equal(np.isnan(entropy[:, 0]), [False] * (LIMIT - 1) + [True])
    # Of 100 responses, 5 have a third token and 4 a fourth.
    records.distributions[0]["length"] = [0, 95, 1, *[0] * (LIMIT - 4), 4]
    entropy, _ = heat("Entropy, by position", records)
    np.testing.assert_array_equal(np.isnan(entropy[:, 0]), [False] * 3 + [True] * (LIMIT - 3))


def test_one_outlier_does_not_fade_the_rest() -> None:
    records = run(60)
    records.distributions[30]["kl_by_position"][0] = 1e4
    _, axis = heat("KL from the reference, by position", records)
    low, high = axis.get_images()[0].get_clim()
    assert low == 0
    assert 0.9 < high < 1.1


def test_a_grid_has_a_row_for_each_run() -> None:
    """As the pictures of the guide have it."""
    one, other = run(5), run(8)
    cells = [(panel(title), records) for records in (one, other) for title in ("Score", "Entropy")]
    axes = curves.draw_grid(cells, columns=2).axes
    assert [axis.get_title("left") for axis in axes] == ["Score", "Entropy"] * 2
    assert [len(axis.get_lines()[0].get_xdata()) for axis in axes] == [5, 5, 8, 8]


def test_running_mean_is_centred_and_narrower_at_the_ends() -> None:
    y = [float(i * i) for i in range(30)]
    mean = panels._running_mean(y)
    assert math.isclose(mean[15], sum(y[11:20]) / 9)
    assert math.isclose(mean[0], sum(y[:5]) / 5)
    assert math.isclose(mean[-1], sum(y[-5:]) / 5)
