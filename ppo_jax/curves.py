"""curves.png: what to look at while PPO trains, on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator


class Line(NamedTuple):
    metric: str
    label: str
    color: str
    style: str = "-"


class Panel(NamedTuple):
    title: str
    unit: str
    lines: Sequence[Line]
    limits: tuple[float | None, float | None] = (None, None)  # of the vertical axis


BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#718096"


def _scores(training: str, held_out: str) -> Sequence[Line]:
    return (
        Line(training, "training", BLUE),
        Line(f"eval/sampled/{held_out}", "held out, sampled", ORANGE, "o-"),
        Line(f"eval/greedy/{held_out}", "held out, greedy", GREEN, "s--"),
    )


def _one(metric: str) -> Sequence[Line]:
    return (Line(metric, "", BLUE),)


PANELS = (
    Panel("Score", "reward function's units", _scores("objective/score", "score")),
    Panel("Gold score, never trained on", "gold reward's units", _scores("reward/gold", "gold")),
    Panel("Score less KL penalty", "reward function's units", _one("objective/reward")),
    Panel("KL from the reference model", "nats a response", _one("objective/kl")),
    Panel("Entropy", "nats a token", _one("policy/entropy"), (0, None)),
    Panel("Response length", "tokens", _scores("rollout/length_mean", "length_mean"), (0, None)),
    Panel(
        "Responses that end by themselves",
        "share of responses",
        _scores("rollout/eos_rate", "eos_rate"),
        (-0.03, 1.03),
    ),
    Panel(
        "Value function: explained variance",
        "share of the returns' variance",
        _one("value/explained_variance"),
        (-1, 1),
    ),
    Panel("Clip fraction", "share of tokens", _one("policy/clip_fraction"), (0, None)),
    Panel("KL(old ‖ new) of an update", "nats a token", _one("policy/approx_kl"), (0, None)),
    Panel("Gradient norm, before clipping", "norm", _one("policy/grad_norm"), (0, None)),
    Panel("Speed", "tokens a second", _one("throughput/tokens_per_s"), (0, None)),
)
"""Panels whose metrics a run does not have are left out."""

_COLUMNS = 4
_WINDOW = 9  # iterations, of the running mean that is drawn over noisy curves


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the metrics of a run, one record an iteration, to a PNG file."""
    known = {name for record in metrics for name in record}
    panels = [p for p in PANELS if any(line.metric in known for line in p.lines)]
    rows = max(-(-len(panels) // _COLUMNS), 1)
    width, height = 4.2 * _COLUMNS, 3.2 * rows  # inches
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Fixed margins: to compute them takes as long as to draw.
    figure.subplots_adjust(
        left=0.9 / width,
        right=1 - 0.2 / width,
        bottom=0.5 / height,
        top=1 - 0.5 / height,
        wspace=0.28,
        hspace=0.46,
    )
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, metrics)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def _draw(axis: Axes, panel: Panel, metrics: Sequence[Mapping[str, Any]]) -> None:
    for line in panel.lines:
        x, y = _points(line.metric, metrics)
        if line.style != "-":
            style: dict[str, Any] = {"ms": 3.5, "lw": 1.2, "clip_on": False}
            axis.plot(x, y, line.style, color=line.color, label=line.label, **style)
        elif len(y) < 2 * _WINDOW:
            axis.plot(x, y, color=line.color, label=line.label, lw=1.4)
        else:
            axis.plot(x, y, color=line.color, alpha=0.3, lw=0.8)
            axis.plot(x, _running_mean(y), color=line.color, label=line.label, lw=1.6)
    several = len(panel.lines) > 1
    pad = 20 if several else 6
    axis.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=pad)
    if several:  # between title and axes, where no data can be
        where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99), "ncols": 3}
        axis.legend(**where, fontsize=8, frameon=False, handlelength=1.6, columnspacing=1.2)
    axis.set_ylabel(panel.unit, fontsize=9, color=GREY)
    axis.set_xlabel("iteration", fontsize=9, color=GREY)
    axis.set_xlim(left=0)
    bottom, top = panel.limits
    if bottom == 0:
        top = 1.08 * axis.dataLim.ymax or None
    axis.set_ylim(bottom, top)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _points(
    metric: str, metrics: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[int], Sequence[float]]:
    """Iterations and values, without those that were not finite (null in the file)."""
    points = [(m["iteration"], m[metric]) for m in metrics if m.get(metric) is not None]
    # The untrained policy's evaluation stands in the first record: iteration 0 has none.
    baseline = metrics[0].get(metric.replace("eval/", "baseline/"))
    if metric.startswith("eval/") and baseline is not None:
        points.insert(0, (0, baseline))
    x, y = zip(*points, strict=True) if points else ((), ())
    return x, y


def _running_mean(y: Sequence[float]) -> list[float]:
    """Centred mean over at most `_WINDOW` points, fewer at the ends."""
    half = _WINDOW // 2
    windows = (y[max(0, i - half) : i + half + 1] for i in range(len(y)))
    return [sum(window) / len(window) for window in windows]
