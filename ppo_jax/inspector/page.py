"""The inspector's page: one HTML file, with all that it shows inside of it.

Of the run's files it shows a record of `tokens.jsonl`, the distributions of the same iteration, the
curves, and with a second run its curves and its answers to the same prompts.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template
from typing import Any

Record = Mapping[str, Any]

MAX_BYTES = 5_000_000
_ROOM = 4_500_000  # of it for the episodes
_POINTS = 300  # of a curve
_HEIGHT = 720  # pixels, in a notebook

_CURVES = (
    ("Accuracy", "share of responses", "reward/accuracy"),
    ("Score", "of training", "objective/score"),
    ("Score", "held out, sampled", "eval/sampled/score"),
    ("Score", "held out, greedy", "eval/greedy/score"),
    ("KL from the reference", "nats a response", "objective/kl"),
    ("Entropy", "nats a token", "policy/entropy"),
    ("Length", "tokens", "rollout/length_mean"),
    ("KL of an update", "nats a token", "policy/approx_kl"),
    ("Explained variance", "of the value function", "value/explained_variance"),
)
_FACTS = (
    ("score", "objective/score"),
    ("KL", "objective/kl"),
    ("entropy", "policy/entropy"),
    ("length", "rollout/length_mean"),
    ("clipped", "policy/clip_fraction"),
)


@dataclass(frozen=True)
class RunRecords:
    """What the page reads of a run."""

    name: str
    metrics: Sequence[Record] = ()
    samples: Sequence[Record] = ()


@dataclass(frozen=True)
class Inspection:
    """Episodes of one iteration, token by token; in a notebook, the page itself.

    Args:
        tokens: a record of `tokens.jsonl`, or `PPOAgent.tokens`.
        run: what else is known of the run.
        distributions: the record of `distributions.jsonl` of the same iteration.
        edges: of the bins of its histograms, by name.
        clip_limits: of the ratio.
        other: a run to compare with.
    """

    tokens: Record
    run: RunRecords = RunRecords("the run")
    distributions: Record = field(default_factory=dict)
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    clip_limits: tuple[float, float] | None = None
    other: RunRecords | None = None

    def html(self) -> str:
        """The page. Episodes that would make it larger than 5 MB are left out, and it says so."""
        episodes, left_out = _that_fit(self.tokens["episodes"])
        number = self.tokens["iteration"]
        here: Record = next((m for m in self.run.metrics if m["iteration"] == number), {})
        runs = [self.run] if self.other is None else [self.run, self.other]
        note = (
            f"{len(episodes)} of {len(self.tokens['batch']['score'])} episodes of the batch, from "
            "the lowest score to the highest."
        )
        if left_out:
            note += f" {left_out} more are left out, so that the page stays below 5 MB."
        data = {
            "iteration": number,
            "runs": [run.name for run in runs],
            "facts": [[name, here[key]] for name, key in _FACTS if here.get(key) is not None],
            "note": note,
            "episodes": episodes,
            "batch": self.tokens["batch"],
            "distributions": self._distributions(),
            "curves": _curves(runs),
            "answers": _answers(runs) if self.other is not None else [],
        }
        # Whatever a model writes ends no script, and JSON reads the same.
        content = _dumps(data).replace("<", "\\u003c")
        parts = {name: (files(__package__) / f"page.{name}").read_text("utf-8") for name in _PARTS}
        title = html.escape(f"{self.run.name}, iteration {number}")
        return Template(parts["html"]).substitute(
            title=title, css=parts["css"], js=parts["js"], data=content
        )

    def _repr_html_(self) -> str:
        page = html.escape(self.html())
        style = f"width: 100%; height: {_HEIGHT}px; border: 0"
        return f'<iframe srcdoc="{page}" style="{style}" title="Tokens"></iframe>'

    def _distributions(self) -> dict[str, Any]:
        of = self.distributions
        titles = {
            "ratio": ("Ratio, new to old", "of all updates", self.clip_limits or ()),
            "advantage": ("Advantage", "standard deviations", ()),
        }
        histograms = [
            {
                "title": title,
                "unit": unit,
                "edges": list(self.edges[name]),
                "counts": of[name],
                "limits": limits,
            }
            for name, (title, unit, limits) in titles.items()
            if name in of and name in self.edges
        ]
        positions = {
            "kl_by_position": "KL from the reference",
            "entropy_by_position": "Entropy",
        }
        by_position = [
            {"title": title, "unit": "nats, by position", "values": of[name]}
            for name, title in positions.items()
            if name in of
        ]
        return {"histograms": histograms, "by_position": by_position}


_PARTS = ("html", "css", "js")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _that_fit(episodes: Sequence[Record]) -> tuple[list[Record], int]:
    """Those that the page has room for, and how many it has none for; extremes come first."""
    order = sorted(range(len(episodes)), key=lambda i: min(i, len(episodes) - 1 - i))
    kept, room = [], _ROOM
    for i in order:
        # A page escapes "<", and may be saved in an encoding of three bytes a character.
        size = len(_dumps(episodes[i]).replace("<", "\\u003c").encode(errors="replace"))
        if size <= room:
            kept.append(i)
            room -= size
    return [episodes[i] for i in sorted(kept)], len(episodes) - len(kept)


def _curves(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    curves = []
    for title, unit, name in _CURVES:
        series = [_points(run.metrics, name) for run in runs]
        if any(len(points) > 1 for points in series):
            curves.append({"title": title, "unit": unit, "series": series})
    return curves


def _points(metrics: Sequence[Record], name: str) -> list[tuple[int, float]]:
    points = [(m["iteration"], m[name]) for m in metrics if m.get(name) is not None]
    step = -(-len(points) // _POINTS) or 1
    thin = points[::step]
    return thin if not points or thin[-1] == points[-1] else [*thin, points[-1]]


def _answers(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """What the runs answered last to the prompts that they have in common."""
    last = []
    for run in runs:
        iteration = max((sample["iteration"] for sample in run.samples), default=0)
        last.append(
            {
                (sample["prompt"], sample["decoding"]): sample
                for sample in run.samples
                if sample["iteration"] == iteration
            }
        )
    common = [key for key in last[0] if all(key in answers for answers in last)]
    return [
        {
            "prompt": prompt,
            "rows": [
                {
                    "run": number,
                    "decoding": decoding,
                    "score": answers[prompt, decoding]["score"],
                    "completion": answers[prompt, decoding]["completion"],
                }
                for decoding in dict.fromkeys(d for p, d in common if p == prompt)
                for number, answers in enumerate(last)
            ],
        }
        for prompt in dict.fromkeys(prompt for prompt, _ in common)
    ]
