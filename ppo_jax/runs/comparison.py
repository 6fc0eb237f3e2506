"""Runs with different settings and seeds: what each setting comes to, and how sure that is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

from ppo_jax.runs.curves import save_png
from ppo_jax.runs.panels import BLUE, GREEN, GREY, ORANGE
from ppo_jax.runs.seeds import Interval, Verdict, holm, interval, paired, verdict

Runs = dict[str, dict[int, Sequence[Mapping[str, Any]]]]
"""The metrics of runs, by setting and by seed."""

MEASURES = {
    "eval/sampled/accuracy": "accuracy",
    "eval/sampled/score": "score",
    "eval/greedy/score": "score, greedy",
    "eval/sampled/gold": "gold score",
    "objective/kl": "KL",
    "policy/entropy": "entropy",
    "eval/sampled/length_mean": "length",
    "eval/accuracy": "accuracy, held out",
    "eval/loss": "loss, held out",
}
"""What runs are compared by, as they are at the end."""

_MARKS: dict[Verdict, str] = {"robust": "**", "suggestive": "*", "noise": ""}
_COLORS = (BLUE, ORANGE, GREEN, GREY, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_NOTE = (
    "Means over seeds, ± half a 95 % interval (Student's t). Δ is the difference from the first "
    "setting, over the seeds that both have: ** stands after Holm's correction for the number of "
    "settings, * does not, and without a mark it may be chance."
)


class Cell(NamedTuple):
    """What a setting comes to in one measure, and its difference from the first setting."""

    value: Interval
    difference: Interval | None = None
    verdict: Verdict = "noise"

    def __str__(self) -> str:
        text = _with_half(self.value, "")
        if self.difference is not None:
            text += f" (Δ {_with_half(self.difference, '+')}{_MARKS[self.verdict]})"
        return text


class Row(NamedTuple):
    setting: str
    num_seeds: int
    cells: dict[str, Cell]  # by measure


def compare(runs: Runs) -> list[Row]:
    """A row for each setting, with the measures that its runs have at their end."""
    finals = {
        name: {measure: _finals(seeds, measure) for measure in MEASURES}
        for name, seeds in runs.items()
    }
    first, *others = runs
    cells: dict[str, dict[str, Cell]] = {name: {} for name in runs}
    for measure in MEASURES:
        for name in runs:
            if values := finals[name][measure]:
                cells[name][measure] = Cell(interval([*values.values()]))
        found = {
            name: pair
            for name in others
            if (pair := paired(finals[name][measure], finals[first][measure])) is not None
        }
        corrected = holm([p for _, p in found.values()])
        for (name, (difference, p)), raised in zip(found.items(), corrected, strict=True):
            cell = cells[name][measure]
            cells[name][measure] = Cell(cell.value, difference, verdict(p, raised))
    return [Row(name, len(seeds), cells[name]) for name, seeds in runs.items()]


def _finals(seeds: Mapping[int, Sequence[Mapping[str, Any]]], measure: str) -> dict[int, float]:
    """The last number of each run that has one."""
    finals: dict[int, float] = {}
    for seed, metrics in seeds.items():
        values = [line[measure] for line in metrics if line.get(measure) is not None]
        if values:
            finals[seed] = values[-1]
    return finals


def table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    result = Table(box=box.SIMPLE_HEAD, caption=_NOTE, caption_justify="left", caption_style="")
    columns = _columns(rows)
    for title in ("setting", "seeds", *columns.values()):
        result.add_column(title, justify="left" if title == "setting" else "right")
    for row in rows:
        result.add_row(row.setting, str(row.num_seeds), *_texts(row, columns))
    return result


def markdown(rows: Sequence[Row]) -> str:
    """The same as a page."""
    columns = _columns(rows)
    lines = [["setting", "seeds", *columns.values()], ["---", *["---:"] * (1 + len(columns))]]
    lines += [[row.setting, str(row.num_seeds), *_texts(row, columns)] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{_NOTE}\n"


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    return {m: title for m, title in MEASURES.items() if any(m in row.cells for row in rows)}


def _texts(row: Row, columns: Mapping[str, str]) -> list[str]:
    return [str(row.cells[measure]) if measure in row.cells else "" for measure in columns]


def _with_half(x: Interval, sign: str) -> str:
    half = "" if np.isnan(x.half) else f" ± {x.half:.2f}"
    return f"{x.mean:{sign}.2f}{half}"


def draw(runs: Runs, path: Path) -> None:
    """Each measure over iterations: means over the seeds, and bands of their 95 % intervals."""
    training = {"objective/score": "score, training", "train/loss": "loss, training"}
    measures = training | MEASURES
    known = {
        measure: title
        for measure, title in measures.items()
        if any(_finals(seeds, measure) for seeds in runs.values())
    }
    columns = min(len(known), 4) or 1
    rows = -(-len(known) // columns) or 1
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (measure, title) in zip(axes, known.items(), strict=False):
        for number, (name, seeds) in enumerate(runs.items()):
            points = _by_iteration(seeds, measure)
            color = _COLORS[number % len(_COLORS)]
            means = np.array([x.mean for x in points.values()])
            halves = np.array([x.half for x in points.values()])
            axis.plot([*points], means, color=color, lw=1.4, label=name)
            axis.fill_between(
                [*points], means - halves, means + halves, color=color, alpha=0.15, lw=0
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("iteration", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(known) :]:
        axis.set_axis_off()
    if len(runs) > 1 and known:
        figure.axes[0].legend(frameon=False, fontsize=8)
    save_png(figure, path)


def _by_iteration(
    seeds: Mapping[int, Sequence[Mapping[str, Any]]], measure: str
) -> dict[int, Interval]:
    """Over the seeds, where all have a number."""
    values: dict[int, list[float]] = {}
    for metrics in seeds.values():
        for line in metrics:
            if line.get(measure) is not None:
                values.setdefault(line["iteration"], []).append(line[measure])
    return {i: interval(x) for i, x in sorted(values.items()) if len(x) == len(seeds)}
