"""Three plots: the preset's curves, the ablations, and score against KL."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from learning.report import COMPARED, Summary
from learning.settings import BASELINE, LONG, SFT
from ppo_jax.runs.seeds import Interval, Verdict

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#6b7280"
COLORS: dict[Verdict, str] = {"robust": ORANGE, "suggestive": BLUE, "noise": GREY}

CURVES = (
    ("Proxy score", "reward model's units", {"sampled/score": "sampled", "greedy/score": "greedy"}),
    ("Gold score", "grammar's units", {"sampled/gold": "sampled", "greedy/gold": "greedy"}),
    ("KL from the reference", "nats a response", {"kl": ""}),
    ("Entropy", "nats a token", {"entropy": ""}),
    (
        "Response length",
        "tokens",
        {"sampled/length_mean": "sampled", "greedy/length_mean": "greedy"},
    ),
    (
        "Grammatical",
        "share of reviews",
        {"sampled/grammatical": "sampled", "greedy/grammatical": "greedy"},
    ),
)


def plot_all(summary: Summary, folder: Path) -> None:
    """Draw what there are runs for: curves.png, ablations.png, frontier.png."""
    if LONG in summary.curves:
        save(_curves(summary), folder / "curves.png")
    if summary.differences:
        save(_ablations(summary), folder / "ablations.png")
    if summary.best_of and LONG in summary.curves:
        save(_frontier(summary), folder / "frontier.png")


def save(figure: Figure, path: Path) -> None:
    """As a picture for the documentation."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _curves(summary: Summary) -> Figure:
    """The preset's held-out measures against the tokens it was trained on."""
    points = summary.curves[LONG]
    tokens = [point["tokens"].mean / 1000 for point in points]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for axis, (title, unit, metrics) in zip(figure.subplots(2, 3).flat, CURVES, strict=True):
        for (metric, label), color in zip(metrics.items(), (ORANGE, GREEN), strict=False):
            _band(axis, tokens, [point[metric] for point in points], color, label)
        if len(metrics) > 1:
            axis.legend(frameon=False, fontsize=8)
        describe(axis, title, unit, "thousands of tokens (prompt and response)")
    figure.suptitle(
        f"PPO on the pocket task, 128 held-out prompts: mean of {summary.seeds[LONG]} seeds, "
        "95 % confidence interval",
        x=0.01,
        ha="left",
    )
    return figure


def _band(axis: Axes, x: Sequence[float], y: Sequence[Interval], color: str, label: str) -> None:
    axis.plot(x, [point.mean for point in y], color=color, label=label, lw=1.6)
    low, high = [point.low for point in y], [point.high for point in y]
    axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def _ablations(summary: Summary) -> Figure:
    """Every setting's differences, a row each."""
    settings = [s for s in summary.settings if s.name in summary.differences][::-1]
    figure = Figure(figsize=(12, 1.4 + 0.24 * len(settings)), layout="constrained")
    axes = figure.subplots(1, len(COMPARED), sharey=True)
    units = ("reward model's units", "grammar's units", "nats a response")
    for axis, column, unit in zip(axes, COMPARED, units, strict=True):
        for row, setting in enumerate(settings):
            difference = summary.differences[setting.name][column.metric]
            mean, half = difference.interval
            color = COLORS[difference.verdict]
            axis.errorbar(mean, row, xerr=half, fmt="o", ms=4, color=color, capsize=2, lw=1.4)
        axis.axvline(0, color="black", lw=0.8)
        for row in range(1, len(settings)):
            if settings[row].group != settings[row - 1].group:
                axis.axhline(row - 0.5, color=GREY, lw=0.5, alpha=0.5)
        describe(axis, f"Δ {column.title}", "", unit)
    axes[0].set_yticks(range(len(settings)), [_label(s.name, s.against) for s in settings])
    axes[0].set_ylim(-0.7, len(settings) - 0.3)
    figure.suptitle(
        "One knob turned: difference from the baseline by seed, 95 % confidence interval.  "
        "Orange: robust after correction; blue: interval without 0, not corrected; grey: noise",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def _label(name: str, against: str) -> str:
    return name if against == BASELINE else f"{name} (against {against})"


def _frontier(summary: Summary) -> Figure:
    """What a nat of KL buys."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for axis, (title, name) in zip(
        figure.subplots(1, 2), (("Proxy score", "score"), ("Gold score", "gold")), strict=True
    ):
        best = [(row["kl"].mean, row[name].mean) for row in summary.best_of]
        if summary.frontier:
            line = [(point["kl"], point[name]) for point in summary.frontier]
            axis.plot(*zip(*line, strict=True), "k--", lw=1, label="the best that any policy can")
        axis.plot(*zip(*best, strict=True), "s-", color=GREEN, ms=4, label="best of n (KL at most)")
        for row, (x, y) in zip(summary.best_of, best, strict=True):
            axis.annotate(f"{row['n'].mean:.0f}", (x, y), (3, -11), textcoords="offset points",
                          fontsize=7, color=GREEN)  # fmt: skip
        path = [(p["kl"].mean, p[f"sampled/{name}"].mean) for p in summary.curves[LONG]]
        axis.plot(*zip(*path, strict=True), "o-", color=ORANGE, ms=3, label="PPO on its way")
        points = [(setting.name, GREY) for setting in summary.settings]
        points += [(sft, BLUE) for sft in SFT if sft in summary.finals]
        for setting, color in points:
            final = summary.finals[setting]
            x, y = final["kl"], final[f"sampled/{name}"]
            axis.errorbar(
                x.mean, y.mean, xerr=x.half, yerr=y.half, fmt="o", ms=4, color=color, lw=0.7
            )
        places = {setting: _place(summary, setting, name) for setting, _ in points}
        for setting in _uncrowded(places):
            axis.annotate(setting, places[setting], (4, 3), textcoords="offset points", fontsize=7)
        axis.plot([], [], "o", color=GREY, ms=4, label="PPO, one knob turned")
        axis.plot([], [], "o", color=BLUE, ms=4, label="SFT on the best of n")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        describe(axis, title, "", "KL from the untrained model, nats a response")
    figure.suptitle("Held-out score of sampled responses against KL", x=0.01, ha="left")
    return figure


def _place(summary: Summary, setting: str, name: str) -> tuple[float, float]:
    final = summary.finals[setting]
    return final["kl"].mean, final[f"sampled/{name}"].mean


def _uncrowded(places: dict[str, tuple[float, float]]) -> list[str]:
    """Those with room for a label; in a crowd of like settings, none is told from the others."""
    nats, score = 2.0, 0.06
    return [
        name
        for name, (x, y) in places.items()
        if not any(
            other != name and abs(x - u) < nats and abs(y - v) < score
            for other, (u, v) in places.items()
        )
    ]


def describe(axis: Axes, title: str, unit: str, x: str) -> None:
    """What an axis shows, and how it looks."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(unit, fontsize=9, color=GREY)
    axis.set_xlabel(x, fontsize=9, color=GREY)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
