"""Make the pictures of `docs/when_it_goes_wrong.md`: run what goes wrong, draw what shows it.

    python benchmarks/guide_pictures.py [--runs runs/guide]

Each run is a run of the pocket task by `python -m ppo_jax.train`, about a minute on two idle cores;
those that are there already are not made again. `--commands` prints the commands and stops.

    python benchmarks/guide_pictures.py --pocket runs/pocket --qwen runs/qwen

draws the README's pictures of those runs, from what `make train` and `make train-qwen` left.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppo_jax.runs.curves import PANELS, draw_grid, plot_curves, save_png
from ppo_jax.runs.folder import read_records
from ppo_jax.runs.panels import HeatPanel, LinePanel, PathPanel, Records

ROOT = Path(__file__).parents[1]

SENTIMENT = "qwen_env.rewards.sentiment:pocket_sentiment"
LENGTH, RARE = "benchmarks.guide_rewards:length", "benchmarks.guide_rewards:rare"

# A value loss of full weight, so that one that is too large shows.
PRESET = ["--preset", "pocket", "--value-coef", "1"]

RUNS: dict[str, list[str]] = {
    "healthy": [],
    "fast": ["--learning-rate", "3e-3"],
    "no_penalty": ["--kl-coef", "0"],
    "noise": ["--entropy-coef", "0.3"],
    "rare": ["--reward", RARE],
    "sentiment": ["--reward", SENTIMENT],
    "big_scores": ["--reward", f"100 * {SENTIMENT}", "--kl-coef", "5"],
    "long": ["--reward", f"1 * {SENTIMENT} + 3 * {LENGTH}"],
    # Not drawn: the guide has numbers of them.
    "fast_stopped": ["--learning-rate", "3e-3", "--target-kl", "0.02"],
    "stopped_critic": ["--reward", f"100 * {SENTIMENT}", "--kl-coef", "5", "--critic", "stopped"],
    "scaled_scores": ["--reward", f"100 * {SENTIMENT}", "--scale-scores"],
}
"""The flags of each run, after `python -m ppo_jax.train --preset pocket --value-coef 1`."""


class Picture(NamedTuple):
    """A row of panels of each run, one above the other."""

    rows: dict[str, str]  # run -> what is written beside its row
    panels: list[str]  # titles


_GAIN, _LENGTHS = "Gain of score and gold score", "Response lengths of a batch"
_EXPLAINED = "Value function: explained variance"

PICTURES: dict[str, Picture] = {
    "healthy": Picture(
        {"healthy": "healthy"}, ["Score", "KL from the reference model", "Clip fraction"]
    ),
    "fast": Picture(
        {"healthy": "learning rate 3e-4", "fast": "learning rate 3e-3"},
        [_GAIN, "Entropy", "Ratio of new to old probability"],
    ),
    "no_penalty": Picture(
        {"healthy": "kl_coef 0.05", "no_penalty": "kl_coef 0"},
        [_GAIN, "Gain against KL", "KL from the reference, by position"],
    ),
    "big_scores": Picture(
        {"sentiment": "reward", "big_scores": "100 × reward"},
        ["Gold score, never trained on", "Gradient norm, before clipping", "Entropy"],
    ),
    "noise": Picture(
        {"healthy": "entropy_coef 0", "noise": "entropy_coef 0.3"},
        [_GAIN, "Entropy, by position", _LENGTHS],
    ),
    "rare": Picture(
        {"healthy": "a dense reward", "rare": "a rare reward"}, ["Score", "Advantages", _EXPLAINED]
    ),
    "long": Picture(
        {"sentiment": "reward", "long": "reward + length"},
        [_GAIN, "Responses that end by themselves", _LENGTHS],
    ),
}

OVERVIEWS = {
    "pocket": ["Score", "Gold score, never trained on", "KL from the reference model"],
    "qwen": ["Accuracy", "KL from the reference model", "Entropy"],
}
"""Titles of the panels at the top of the README."""

_SIZE = 3.9, 2.9  # inches, of a panel: small, so that its words are large where it is shown
_RIGHT_COLOR, _WRONG_COLOR = "#009e73", "#d55e00"
_BY_TITLE = {panel.title: panel for panel in PANELS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "guide")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--commands", action="store_true")
    for name in OVERVIEWS:
        parser.add_argument(f"--{name}", type=Path, metavar="RUN")
    arguments = parser.parse_args()
    if named := {name: run for name in OVERVIEWS if (run := getattr(arguments, name))}:
        for name, run in named.items():
            draw_run(name, read_records(run), arguments.docs)
        return
    for name, flags in RUNS.items():
        folder = arguments.runs / name
        command = [sys.executable, "-m", "ppo_jax.train", *PRESET, *flags]
        if arguments.commands:
            print(shlex.join(["python", *command[1:], "--output-dir", str(folder)]))
        elif not (folder / "final").exists():
            resume = ["--resume"] if (folder / "config.json").exists() else []
            command += ["--output-dir", str(folder.resolve()), *resume]
            subprocess.run(command, check=True, cwd=ROOT)  # rewards are imported from there
    for name, picture in PICTURES.items() if not arguments.commands else ():
        figure = draw(picture, {run: read_records(arguments.runs / run) for run in picture.rows})
        path = arguments.docs / f"curves_{name}.png"
        save_png(figure, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def draw_run(name: str, run: Records, docs: Path) -> None:
    """A run in three panels, and in all that there are."""
    cells = [(_BY_TITLE[title], run) for title in OVERVIEWS[name]]
    overview = draw_grid(cells, columns=len(cells), size=_SIZE)
    save_png(overview, docs / f"{name}_overview.png")
    plot_curves(run, docs / f"{name}_curves.png")


def draw(picture: Picture, runs: dict[str, Records]) -> Figure:
    panels = [_BY_TITLE[title] for title in picture.panels]
    cells = [(panel, run) for run in runs.values() for panel in panels]
    figure = draw_grid(cells, columns=len(panels), size=_SIZE, left=1.05)
    rows = [figure.axes[i : i + len(panels)] for i in range(0, len(cells), len(panels))]
    for panel, *column in zip(panels, *rows, strict=True):
        share_scales(panel, column)
    for i, (row, label) in enumerate(zip(rows, picture.rows.values(), strict=True)):
        place = row[0].get_position()
        color = _RIGHT_COLOR if i == 0 else _WRONG_COLOR
        figure.text(
            0.25 / figure.get_figwidth(),
            (place.y0 + place.y1) / 2,
            label,
            rotation=90,
            ha="center",
            va="center",
            fontsize=12,
            fontweight="bold",
            color=color,
        )
    return figure


def share_scales(panel: object, column: list[Axes]) -> None:
    """The same axes and colours for all runs, or a small trouble would look like a large one."""
    for axis in column:
        if isinstance(panel, LinePanel | PathPanel):
            axis.set_ylim(
                min(a.get_ylim()[0] for a in column), max(a.get_ylim()[1] for a in column)
            )
        axis.set_xlim(min(a.get_xlim()[0] for a in column), max(a.get_xlim()[1] for a in column))
    if isinstance(panel, HeatPanel):
        images = [axis.get_images()[0] for axis in column]
        limits = [image.get_clim() for image in images]
        for image in images:
            image.set_clim(min(low for low, _ in limits), max(high for _, high in limits))


if __name__ == "__main__":
    main()
