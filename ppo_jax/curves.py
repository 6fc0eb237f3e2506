"""curves.png: what to look at while PPO trains, on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Line(NamedTuple):
    metric: str
    label: str
    color: str
    style: str = "-"


class Panel(NamedTuple):
    title: str
    unit: str
    lines: Sequence[Line]


BLUE, ORANGE, GREEN, RED, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#c53030", "#718096"

PANELS = (
    Panel(
        "Score",
        "reward function's units",
        (
            Line("objective/score", "training", BLUE),
            Line("eval/sampled/score", "held out, sampled", ORANGE, "o-"),
            Line("eval/greedy/score", "held out, greedy", GREEN, "s--"),
        ),
    ),
    Panel(
        "Gold score",
        "gold reward's units",
        (
            Line("reward/gold", "training", BLUE),
            Line("eval/sampled/gold", "held out, sampled", ORANGE, "o-"),
            Line("eval/greedy/gold", "held out, greedy", GREEN, "s--"),
        ),
    ),
    Panel(
        "What the reward pays for",
        "score's units",
        (
            Line("objective/score", "score", BLUE),
            Line("objective/reward", "score less KL penalty", RED),
        ),
    ),
    Panel("KL from the reference model", "nats a response", (Line("objective/kl", "KL", BLUE),)),
    Panel("Entropy", "nats a token", (Line("policy/entropy", "policy", BLUE),)),
    Panel(
        "Responses",
        "tokens",
        (Line("rollout/length_mean", "mean length", BLUE),),
    ),
    Panel(
        "Endings",
        "share of responses",
        (Line("rollout/eos_rate", "end of sequence", BLUE),),
    ),
    Panel(
        "Policy update",
        "share of tokens, nats a token",
        (
            Line("policy/clip_fraction", "clip fraction", BLUE),
            Line("policy/approx_kl", "KL(old ‖ new)", ORANGE),
        ),
    ),
    Panel(
        "Value function",
        "share of variance",
        (Line("value/explained_variance", "explained variance", BLUE),),
    ),
)
"""Panels whose metrics a run does not have are left out."""

_COLUMNS = 3
_WINDOW = 9  # iterations, of the running mean that is drawn over noisy curves


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the metrics of a run, one record an iteration, to a PNG file."""
    known = {name for record in metrics for name in record}
    panels = [p for p in PANELS if any(line.metric in known for line in p.lines)]
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.6 * _COLUMNS, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(rows, 1), _COLUMNS, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, metrics)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def _draw(axis: Axes, panel: Panel, metrics: Sequence[dict[str, Any]]) -> None:
    drawn = 0
    for line in panel.lines:
        points = [(m["iteration"], m[line.metric]) for m in metrics if line.metric in m]
        # The untrained policy's evaluation stands in the first record: iteration 0 has none.
        baseline = line.metric.replace("eval/", "baseline/")
        if metrics and baseline != line.metric and baseline in metrics[0]:
            points.insert(0, (0, metrics[0][baseline]))
        if not points:
            continue
        drawn += 1
        x, y = zip(*points, strict=True)
        if line.style != "-":
            axis.plot(x, y, line.style, color=line.color, label=line.label, ms=4, lw=1.2)
        elif len(points) < 2 * _WINDOW:
            axis.plot(x, y, color=line.color, label=line.label, lw=1.4)
        else:
            axis.plot(x, y, color=line.color, alpha=0.3, lw=0.8)
            axis.plot(x, _running_mean(y), color=line.color, label=line.label, lw=1.6)
    axis.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(panel.unit, fontsize=9, color=GREY)
    axis.set_xlabel("iteration", fontsize=9, color=GREY)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    if drawn > 1:
        axis.legend(fontsize=8, frameon=False)


def _running_mean(y: Sequence[float]) -> list[float]:
    """Centred mean over at most `_WINDOW` points, fewer at the ends."""
    half = _WINDOW // 2
    windows = (y[max(0, i - half) : i + half + 1] for i in range(len(y)))
    return [sum(window) / len(window) for window in windows]
