"""The kinds of panels of `curves.png`: lines, heat maps, paths. `curves.py` says which.

Colours are told apart by colour-blind readers too: Okabe and Ito's for lines, and maps whose
lightness changes one way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from ppo_jax.generation.intervals import wilson_interval

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#6b7280"

_WINDOW = 9  # iterations, of the running mean that is drawn over noisy curves
_FEW = 10  # points that a curve shows one by one
_HEAT, _TIME = "YlGnBu", "viridis_r"
_TOO_FEW = 0.05  # of the responses: a mean at a position that fewer of them reach is noise


class Records(NamedTuple):
    """What a run recorded, one record an iteration."""

    metrics: Sequence[Mapping[str, Any]]
    distributions: Sequence[Mapping[str, Any]] = ()
    clip_limits: tuple[float, float] = (0.8, 1.2)  # of the ratio
    frontier: Mapping[str, Any] | None = None  # what ppo-frontier found, where it was asked


class Panel(Protocol):
    """One axes of the page."""

    @property
    def title(self) -> str: ...

    def is_known(self, run: Records) -> bool:
        """Whether the run has what the panel is there for."""

    def draw(self, axis: Axes, run: Records) -> None: ...


class Line(NamedTuple):
    metric: str
    label: str = ""
    color: str = BLUE
    style: str = "-"
    unit: str | None = None
    """A metric whose first value is the curve's unit; the curve then begins at 0."""
    trials: str | None = None
    """A metric that says of how many trials the curve is the share: it gets a 95 % interval."""
    best: str | None = None
    """What the frontier calls the metric: on a path, the best policies are drawn beside the run."""


@dataclass(frozen=True)
class LinePanel:
    """Metrics over iterations, the first of which is what it is there for.

    Noisy ones are drawn faint, below their running mean.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    limits: tuple[float | None, float | None] = (None, None)  # of the vertical axis
    only_if_it_changes: bool = False

    def is_known(self, run: Records) -> bool:
        values = set(_points(self.lines[0], run.metrics).values())
        return len(values) > self.only_if_it_changes

    def draw(self, axis: Axes, run: Records) -> None:
        for line in self.lines:
            points = _points(line, run.metrics)
            x, y = list(points), list(points.values())
            if line.trials is not None:
                _draw_intervals(axis, line, run.metrics)
            if line.style != "-":
                style: dict[str, Any] = {"ms": 3.5, "lw": 1.2, "clip_on": False}
                axis.plot(x, y, line.style, color=line.color, label=line.label, **style)
            elif len(y) < 2 * _WINDOW:
                marker = "o" if len(y) < _FEW else None  # a line through one point is nothing
                axis.plot(x, y, color=line.color, label=line.label, lw=1.4, marker=marker, ms=3.5)
            else:
                axis.plot(x, y, color=line.color, alpha=0.3, lw=0.8)
                axis.plot(x, _running_mean(y), color=line.color, label=line.label, lw=1.6)
        _dress(axis, self.title, "iteration", self.unit, has_legend=len(self.lines) > 1)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(_whole_numbers())
        bottom, top = self.limits
        if bottom == 0 and top is None:
            top = 1.08 * axis.dataLim.ymax or None
        axis.set_ylim(bottom, top)


def _draw_intervals(axis: Axes, line: Line, metrics: Sequence[Mapping[str, Any]]) -> None:
    """A band of 95 % intervals behind the curve of a share."""
    assert line.trials is not None
    counts = _points(Line(line.trials), metrics)
    intervals = {
        i: wilson_interval(share, counts[i])
        for i, share in _points(line, metrics).items()
        if i in counts and 0 <= share <= 1
    }
    if intervals:
        low, high = zip(*intervals.values(), strict=True)
        axis.fill_between(list(intervals), low, high, color=line.color, alpha=0.15, lw=0)


@dataclass(frozen=True)
class HeatPanel:
    """A distribution over iterations, one column each; white is where there is nothing."""

    title: str
    unit: str  # of the vertical axis
    name: str  # in distributions.jsonl
    color_label: str
    edges: np.ndarray | None = None  # of the bins; None for tokens of the response: 1, 2, ...
    is_count: bool = True  # drawn as shares, on a logarithmic scale; otherwise as it is
    shows_clip_limits: bool = False

    def is_known(self, run: Records) -> bool:
        return any(self.name in record for record in run.distributions)

    def draw(self, axis: Axes, run: Records) -> None:
        records = [record for record in run.distributions if self.name in record]
        first, last = records[0]["iteration"], records[-1]["iteration"]
        columns = np.array([self._column(record) for record in records])
        heat = np.full((columns.shape[1], last - first + 1), np.nan)
        heat[:, [record["iteration"] - first for record in records]] = columns.T
        edges = np.arange(len(heat) + 1) + 0.5 if self.edges is None else self.edges
        image = axis.imshow(
            heat,
            norm=self._norm(columns),
            cmap=_HEAT,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(first - 0.5, last + 0.5, edges[0], edges[-1]),
        )
        if self.shows_clip_limits:
            for limit in run.clip_limits:
                axis.axhline(limit, color=ORANGE, lw=1, ls="--")
        _dress(axis, self.title, "iteration", self.unit)
        axis.xaxis.set_major_locator(_whole_numbers())
        axis.grid(False)
        _color_bar(axis, image, self.color_label)

    def _column(self, record: Mapping[str, Any]) -> np.ndarray:
        """What is drawn of an iteration, NaN where there is nothing."""
        column = np.array(record[self.name], float)  # null becomes NaN
        if self.is_count:
            return np.where(column > 0, column / max(column.sum(), 1), np.nan)
        if "length" in record:
            counts = np.array(record["length"])
            reached = counts[::-1].cumsum()[::-1]  # responses with at least 1, 2, ... tokens
            column[reached < _TOO_FEW * counts.sum()] = np.nan
        return column

    def _norm(self, columns: np.ndarray) -> Normalize:
        seen = columns[np.isfinite(columns)]
        if not seen.size:
            return Normalize(0, 1)
        if not self.is_count:
            return Normalize(0, max(float(np.quantile(seen, 0.98)), 1e-6))
        return LogNorm(min(seen.min(), seen.max() / 10), seen.max())


@dataclass(frozen=True)
class PathPanel:
    """Metrics against another one: a point an iteration, and the way that the run went."""

    title: str
    x: Line
    lines: Sequence[Line]  # whose style is a marker
    x_unit: str
    y_unit: str

    def is_known(self, run: Records) -> bool:
        return any(_points(line, run.metrics) for line in self.lines)

    def draw(self, axis: Axes, run: Records) -> None:
        across = _points(self.x, run.metrics)
        last = max(across, default=1)
        known = [line for line in self.lines if _points(line, run.metrics)]
        for line in known:
            if best := _best_policies(line, run):
                axis.plot(*zip(*best, strict=True), "--", color=line.color, lw=1.2)
            upwards = _points(line, run.metrics)
            iterations = [i for i in upwards if i in across]
            x, y = [across[i] for i in iterations], [upwards[i] for i in iterations]
            points = axis.scatter(
                x, y, c=iterations, vmin=1, vmax=last, cmap=_TIME, marker=line.style, s=16, lw=0
            )
            way: dict[str, Any] = {"marker": line.style, "ms": 4, "markevery": [-1]}
            axis.plot(
                _running_mean(x),
                _running_mean(y),
                color=line.color,
                lw=1.2,
                label=line.label,
                **way,
            )
        if run.frontier is not None:
            axis.plot([], [], "--", color=GREY, lw=1.2, label="the best there is")
        many = len(known) > 1 or run.frontier is not None
        _dress(axis, self.title, self.x_unit, self.y_unit, has_legend=many)
        _color_bar(axis, points, "iteration")


def _best_policies(line: Line, run: Records) -> list[tuple[float, float]]:
    """KL of the best policies, and the curve's unit of what they earn; none where unknown."""
    if run.frontier is None or line.best is None:
        return []
    points = [run.frontier["reference"], *run.frontier["best"]]
    earned = {p["kl"]: ({"reward": p["reward"]} | p["others"]).get(line.best) for p in points}
    known = {kl: reward for kl, reward in earned.items() if reward is not None}
    return list(_in_unit(line, known, run.metrics).items())


def _dress(axis: Axes, title: str, x_unit: str, y_unit: str, *, has_legend: bool = False) -> None:
    pad = 20 if has_legend else 6
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad, parse_math=False)
    if has_legend:  # between title and axes, where no data can be
        where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99), "ncols": 3}
        axis.legend(**where, fontsize=8, frameon=False, handlelength=1.6, columnspacing=1.2)
    axis.set_ylabel(y_unit, fontsize=9, color=GREY)
    axis.set_xlabel(x_unit, fontsize=9, color=GREY)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _color_bar(axis: Axes, colored: ScalarMappable, label: str) -> None:
    """A slim one beside the axes, in nobody's way: all panels stay aligned."""
    figure = axis.get_figure()
    assert figure is not None
    is_share = isinstance(colored.norm, LogNorm)
    bar = figure.colorbar(
        colored,
        cax=axis.inset_axes((1.02, 0.0, 0.03, 1.0)),
        ticks=LogLocator(subs=(1, 3)) if is_share else None,
        format=FuncFormatter(lambda value, _: f"{100 * value:g} %") if is_share else None,
    )
    bar.minorticks_off()
    bar.ax.set_xlabel(label, fontsize=8, color=GREY, labelpad=17)  # as low as that of the axes
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _points(line: Line, metrics: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Values by iteration, without those that were not finite (null in the file)."""
    points: dict[float, float] = {}
    # The untrained policy's evaluation stands in the first record: iteration 0 has none.
    if line.metric.startswith("eval/") and metrics:
        baseline = metrics[0].get(line.metric.replace("eval/", "baseline/"))
        if baseline is not None:
            points[0] = baseline
    points |= {m["iteration"]: m[line.metric] for m in metrics if m.get(line.metric) is not None}
    return _in_unit(line, points, metrics)


def _in_unit(
    line: Line, points: dict[float, float], metrics: Sequence[Mapping[str, Any]]
) -> dict[float, float]:
    """Values of the curve's metric in its unit, counted from where the run began."""
    if line.unit is None or not points:
        return points
    origin = next(m[line.metric] for m in metrics if m.get(line.metric) is not None)
    unit = metrics[0].get(line.unit)
    return {x: (value - origin) / unit for x, value in points.items()} if unit else {}


def _running_mean(y: Sequence[float]) -> list[float]:
    """Centred mean over at most `_WINDOW` points, fewer at the ends."""
    half = _WINDOW // 2
    windows = (y[max(0, i - half) : i + half + 1] for i in range(len(y)))
    return [sum(window) / len(window) for window in windows]
