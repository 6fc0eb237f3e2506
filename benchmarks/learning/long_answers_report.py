"""What the runs on long answers say: at equal samples, at equal time, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from learning.jobs import Record
from learning.long_answers_settings import GROUP, IMPROVED, PPO, SEPARATE, SETTINGS
from learning.plots import BLUE, GREEN, GREY, ORANGE, describe, save
from learning.report import (
    Column,
    Finals,
    interval_text,
    markdown,
    table_of_differences,
)
from ppo_jax.runs.seeds import interval

VARIANCE, TIME = "value/explained_variance", "time/iteration_s"
COLUMNS = (
    Column("paid at the end", "accuracy", 3),
    Column("paid, mean of the run", "run/accuracy", 3),
    Column("paid at equal time", "same_time/accuracy", 3),
    Column("good symbols", "good", 3),
    Column("explained variance", VARIANCE, 2),
    Column("s an iteration", TIME, 2),
)
COMPARED = COLUMNS[:3]
COLORS = {PPO: GREY, SEPARATE: ORANGE, IMPROVED: GREEN, GROUP: BLUE}


def brief(record: Record) -> str:
    """A run in a line."""
    end, curve = record["end"], record["curve"]
    return f"paid {curve[0]['accuracy']:.3f} -> {end['accuracy']:.3f}"


def write(records: Sequence[Record], folder: Path) -> None:
    """Print the tables, write them as tables.md, and draw long_answers.png."""
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    for record in records:
        curves.setdefault(record["name"], {})[record["seed"]] = record["curve"]
    seconds = {
        name: min(point[TIME] for curve in runs.values() for point in curve)
        for name, runs in curves.items()
    }
    values: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        name, curve = record["name"], record["curve"]
        # Those whose iterations take longer are asked earlier. By the fastest iteration: others had
        # to wait for what else the machine did.
        same_time = int(len(curve) * min(seconds.values()) / seconds[name]) - 1
        late = curve[-len(curve) // 3 :]
        measures = record["end"] | {
            "run/accuracy": mean_of(curve, "accuracy"),
            "same_time/accuracy": mean_of(curve[max(same_time - 4, 0) : same_time + 1], "accuracy"),
            TIME: seconds[name],
        }
        if VARIANCE in curve[0]:
            measures[VARIANCE] = mean_of(late, VARIANCE)
        values.setdefault(name, {})[record["seed"]] = measures
    starts = [runs[0]["accuracy"] for runs in curves[records[0]["name"]].values()]
    pairs = [(s.name, s.against) for s in SETTINGS if s.against and s.name in values]
    tables = [_ends(values, float(np.mean(starts))), table_of_differences(pairs, values, COMPARED)]
    for table in tables:
        Console().print(table)
    (folder / "tables.md").write_text("\n".join(map(markdown, tables)))
    save(_picture(curves), folder / "long_answers.png")


def mean_of(points: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([point[name] for point in points]))


def _ends(values: Finals, before: float) -> Table:
    table = Table(
        title="Mean ± half of the 95 % confidence interval over seeds; "
        f"{before:.3f} are paid before"
    )
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    for setting in SETTINGS:
        if runs := list(values.get(setting.name, {}).values()):
            texts = [
                interval_text(interval([run[c.metric] for run in runs]), c.digits)
                if c.metric in runs[0]
                else ""
                for c in COLUMNS
            ]
            table.add_row(setting.name, *texts)
    return table


def _picture(curves: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    paid, variance = figure.subplots(1, 2)
    for name, color in COLORS.items():
        for axis, metric in ((paid, "accuracy"), (variance, VARIANCE)):
            runs = np.array(
                [
                    [point[metric] for point in curve]
                    for curve in curves.get(name, {}).values()
                    if metric in curve[0]
                ]
            )
            if runs.size:
                axis.plot(runs.T, color=color, lw=0.6, alpha=0.5)
                axis.plot(runs.mean(0), color=color, lw=1.8, label=name)
    describe(paid, "Answers that are paid", "share", "iteration")
    describe(variance, "Explained variance of the value function", "share", "iteration")
    for axis in (paid, variance):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    return figure
