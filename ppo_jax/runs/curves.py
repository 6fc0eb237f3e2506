"""curves.png: what to look at while PPO trains, on one page.

What the curves look like when training goes wrong: `docs/when_it_goes_wrong.md`.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_jax.algorithm import ADVANTAGE_EDGES, RATIO_EDGES
from ppo_jax.files import atomic
from ppo_jax.runs.panels import (
    BLUE,
    GREEN,
    ORANGE,
    HeatPanel,
    Line,
    LinePanel,
    Panel,
    PathPanel,
    Records,
)


def _scores(training: str, held_out: str, trials: str | None = None) -> Sequence[Line]:
    """Of training, and of the held-out prompts, of which there are `trials`."""
    return (
        Line(training, "training", BLUE),
        Line(f"eval/sampled/{held_out}", "held out, sampled", ORANGE, "o-", trials=trials),
        Line(f"eval/greedy/{held_out}", "held out, greedy", GREEN, "s--", trials=trials),
    )


def _one(metric: str) -> Sequence[Line]:
    return (Line(metric),)


_SCORE = "reward function's units"
_GAIN = "standard deviations at the start"
_TOKEN = "token of the response"

PANELS: Sequence[Panel] = (
    # What is earned. A score that still rises while the gold score falls is over-optimised.
    LinePanel(
        "Accuracy",
        "share of answers (band: 95 %)",
        _scores("reward/accuracy", "accuracy", "eval/num_prompts"),
        (0, None),
    ),
    LinePanel("Score", _SCORE, _scores("objective/score", "score")),
    LinePanel(
        "Gold score, never trained on", "gold reward's units", _scores("reward/gold", "gold")
    ),
    LinePanel(
        "Gain of score and gold score",
        _GAIN,
        (
            Line("reward/gold", "gold score", ORANGE, unit="reward/gold_std"),
            Line("objective/score", "score", BLUE, unit="objective/score_std"),
        ),
    ),
    PathPanel(
        "Gain against KL",
        Line("objective/kl"),
        (
            Line("reward/gold", "gold score", ORANGE, "^", "reward/gold_std", best="gold"),
            Line("objective/score", "score", BLUE, "o", "objective/score_std", best="reward"),
        ),
        "KL, nats a response",
        _GAIN,
    ),
    # Supervised learning.
    LinePanel(
        "Loss",
        "nats",
        (Line("train/loss", "training", BLUE), Line("eval/loss", "held out", ORANGE, "o-")),
    ),
    LinePanel(
        "Accuracy on pairs",
        "share of pairs (band: 95 %)",
        (
            Line("train/accuracy", "training", BLUE),
            Line("eval/accuracy", "held out", ORANGE, "o-", trials="eval/num_pairs"),
        ),
        (None, 1.0),
    ),
    LinePanel(
        "Calibration error, held out",
        "probability",
        (Line("eval/calibration_error", style="o-", color=ORANGE),),
        (0, None),
    ),
    LinePanel(
        "Scores",
        "mean of a batch",
        (Line("train/chosen", "chosen", GREEN), Line("train/rejected", "rejected", ORANGE)),
    ),
    LinePanel("Entropy of the answers' tokens", "nats", _one("train/entropy"), (0, None)),
    LinePanel("Learning rate", "of a step", _one("train/learning_rate"), (0, None)),
    LinePanel("Gradient norm of a step", "norm", _one("train/grad_norm"), (0, None)),
    # How far the policy has gone, and how fast it goes.
    LinePanel("Score less KL penalty", _SCORE, _one("objective/reward")),
    LinePanel("KL from the reference model", "nats a response", _one("objective/kl")),
    HeatPanel(
        "KL from the reference, by position", _TOKEN, "kl_by_position", "nats", is_count=False
    ),
    LinePanel("KL(old ‖ new) of an update", "nats a token", _one("policy/approx_kl"), (0, None)),
    LinePanel("Clip fraction", "share of tokens", _one("policy/clip_fraction"), (0, None)),
    HeatPanel(
        "Ratio of new to old probability",
        "ratio",
        "ratio",
        "of tokens",
        edges=RATIO_EDGES,
        shows_clip_limits=True,
    ),
    LinePanel("Entropy", "nats a token", _one("policy/entropy"), (0, None)),
    HeatPanel("Entropy, by position", _TOKEN, "entropy_by_position", "nats", is_count=False),
    # What it writes.
    LinePanel(
        "Response length", "tokens", _scores("rollout/length_mean", "length_mean"), (0, None)
    ),
    HeatPanel("Response lengths of a batch", "tokens", "length", "of responses"),
    LinePanel(
        "Responses that end by themselves",
        "share of responses",
        _scores("rollout/eos_rate", "eos_rate"),
        (-0.03, 1.03),
    ),
    LinePanel(
        "Repetition",
        "share of n-grams",
        (
            Line("text/distinct_1", "distinct 1", BLUE),
            Line("text/distinct_2", "distinct 2", GREEN),
            Line("text/repeated_4", "repeated 4", ORANGE),
        ),
        (-0.03, 1.03),
    ),
    # What it learns from.
    LinePanel(
        "Value function: explained variance",
        "share of the returns' variance",
        _one("value/explained_variance"),
        (-1, 1),
    ),
    HeatPanel(
        "Advantages",
        "standard deviations",
        "advantage",
        "of tokens",
        edges=ADVANTAGE_EDGES,
    ),
    LinePanel("Gradient norm, before clipping", "norm", _one("policy/grad_norm"), (0, None)),
    LinePanel("Speed", "tokens a second", _one("throughput/tokens_per_s"), (0, None)),
    LinePanel(
        "KL coefficient", "weight", _one("objective/kl_coef"), (0, None), only_if_it_changes=True
    ),
    LinePanel(
        "Epochs before an early stop",
        "passes over the batch",
        _one("update/epochs"),
        (0, None),
        only_if_it_changes=True,
    ),
)
"""Of all runs. Those of which a run has no data are left out."""

_MAX_COMPONENTS = 8

_COLUMNS = 4
_SIZE = 4.4, 3.2  # inches, width and height of a panel with all around it
_GAPS = 1.2, 1.0  # inches, between two axes


def plot_curves(run: Records, path: Path) -> None:
    """Draw all that a run recorded to a PNG file."""
    accuracy, score, *others = PANELS
    panels = (accuracy, score, *component_panels(run), *others)
    cells = [(panel, run) for panel in panels if panel.is_known(run)]
    save_png(draw_grid(cells, columns=_COLUMNS), path)


def component_panels(run: Records) -> Sequence[Panel]:
    """A panel for each component of the reward, but for those in `PANELS`."""
    metrics = dict.fromkeys(
        name for record in run.metrics for name in record if name.startswith("reward/")
    )
    names = [name.removeprefix("reward/") for name in metrics]
    return [
        LinePanel(f"Reward: {name}", "mean", _scores(f"reward/{name}", name))
        for name in names
        if name not in ("accuracy", "gold", "gold_std")
    ][:_MAX_COMPONENTS]


def draw_grid(
    cells: Sequence[tuple[Panel, Records]],
    *,
    columns: int,
    size: tuple[float, float] = _SIZE,
    left: float = 0.7,
) -> Figure:
    """Panels, each of the run beside it, row by row.

    Args:
        size: width and height of a panel with its share of the gaps, in inches.
        left: margin, in inches.
    """
    rows = max(-(-len(cells) // columns), 1)
    right, bottom, top = 0.8, 0.5, 0.5
    width, height = size[0] * columns, size[1] * rows
    figure = Figure(figsize=(width, height))
    # Fixed margins: to compute them takes as long as to draw.
    axis_width = (width - left - right - _GAPS[0] * (columns - 1)) / columns
    axis_height = (height - bottom - top - _GAPS[1] * (rows - 1)) / rows
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=_GAPS[0] / axis_width,
        hspace=_GAPS[1] / axis_height,
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (panel, run) in zip(axes.flat, cells, strict=False):
        panel.draw(axis, run)
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the whole file or, if the process is killed meanwhile, nothing."""
    FigureCanvasAgg(figure)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
