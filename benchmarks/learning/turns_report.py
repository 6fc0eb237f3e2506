"""What the runs over turns say: a table of their ends, their differences, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from learning.jobs import Record
from learning.plots import BLUE, GREEN, GREY, ORANGE, describe, save
from learning.report import (
    Column,
    Finals,
    interval_text,
    markdown,
    table_of_differences,
)
from learning.turns_settings import (
    BOOTSTRAP,
    CALCULATOR,
    EACH_TURN,
    END,
    MILD,
    PAID,
    SETTINGS,
    TRAP,
    optimum,
)
from ppo_jax.runs.seeds import interval

Curves = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]  # by name, seed, iteration

PINK = "#cc79a7"
COLUMNS = (
    Column("right", "accuracy", 2),
    Column("right, mean of the run", "run/accuracy", 2),
    Column("turns ended", "turns", 2),
    Column("cut off", "cut_off", 2),
    Column("used the tool", "used_tool", 2),
    Column("earned", "score", 2),
)
COMPARED = COLUMNS[:4]


def brief(record: Record) -> str:
    """A run in a line."""
    end = record["end"]
    return ", ".join(f"{column.title} {end[column.metric]:.2f}" for column in COLUMNS[::2])


def write(records: Sequence[Record], folder: Path) -> None:
    """Print the tables, write them as tables.md, and draw turns.png."""
    values: dict[str, dict[int, dict[str, float]]] = {}
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for record in records:
        accuracies = [point["accuracy"] for point in record["curve"]]
        end = record["end"] | {"run/accuracy": sum(accuracies) / len(accuracies)}
        start = record["curve"][0] | {"run/accuracy": accuracies[0]}
        values.setdefault(record["name"], {})[record["seed"]] = end
        values.setdefault(f"before {record['name']}", {})[record["seed"]] = start
        curves.setdefault(record["name"], []).append(record["curve"])
    pairs = [(s.name, s.against) for s in SETTINGS if s.against and s.name in values]
    tables = [_ends(values), table_of_differences(pairs, values, COMPARED)]
    for table in tables:
        Console().print(table)
    (folder / "tables.md").write_text("\n".join(map(markdown, tables)))
    save(_picture(curves), folder / "turns.png")


def _ends(values: Finals) -> Table:
    table = Table(
        title="Before and after: mean ± half of the 95 % confidence interval over seeds. "
        f"Bisection guesses all numbers in {optimum():.2f} turns"
    )
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")

    def row(name: str, label: str) -> None:
        runs = list(values[name].values())
        texts = [
            interval_text(interval([run[c.metric] for run in runs]), c.digits) for c in COLUMNS
        ]
        if CALCULATOR not in name:
            texts[4] = ""
        table.add_row(label, *texts)

    for name, label in ((END, "the game, before"), (CALCULATOR, "calculator, before")):
        if name in values:
            row(f"before {name}", label)
        for setting in SETTINGS:
            is_here = (setting.name == CALCULATOR) == (name == CALCULATOR)
            if setting.name in values and is_here:
                row(setting.name, setting.name)
    return table


def _picture(curves: Curves) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    game, trap, tool = figure.subplots(1, 3)
    for name, color in ((EACH_TURN, ORANGE), (END, BLUE)):
        _lines(game, curves, name, "accuracy", color, name)
    describe(game, "Guess the number", "share guessed", "iteration")
    colors = {TRAP: ORANGE, MILD: GREY, PAID: GREEN, BOOTSTRAP: PINK}
    for name, color in colors.items():
        _lines(trap, curves, name, "turns", color, name)
    trap.axhline(optimum(), color="black", lw=0.8, ls="--")
    trap.annotate("bisection", (1, optimum()), (0, -9), textcoords="offset points", fontsize=7)
    describe(trap, "The trap", "turns ended", "iteration")
    for metric, label, color in (
        ("used_tool", "used the tool", ORANGE),
        ("accuracy", "right", BLUE),
    ):
        _lines(tool, curves, CALCULATOR, metric, color, label)
    describe(tool, "The calculator", "share", "iteration")
    for axis in (game, trap, tool):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    seeds = max(len(runs) for runs in curves.values())
    figure.suptitle(f"PPO over turns: {seeds} seeds (thin) and their mean", x=0.01, ha="left")
    return figure


def _lines(axis: Axes, curves: Curves, name: str, metric: str, color: str, label: str) -> None:
    """Seeds one by one: where some fall into the trap and some do not, a mean is like none."""
    if name not in curves:
        return
    runs = np.array([[point[metric] for point in curve] for curve in curves[name]])
    axis.plot(runs.T, color=color, lw=0.6, alpha=0.5)
    axis.plot(runs.mean(0), color=color, lw=1.8, label=label)
