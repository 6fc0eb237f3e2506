"""What a person sees while a run goes on: a bar with the numbers to watch, evaluations, samples."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

_WATCHED = (
    ("score", "objective/score", "+.3f"),
    ("KL", "objective/kl", ".2f"),
    ("entropy", "policy/entropy", ".2f"),
    ("length", "rollout/length_mean", ".1f"),
    ("tokens/s", "throughput/tokens_per_s", ",.0f"),
)


class Progress:
    """Shows on stderr: a live bar on a terminal, plain lines at evaluations everywhere."""

    def __init__(self, total: int, done: int):
        self._console = Console(stderr=True, highlight=False)
        self._bar = Bar(
            TextColumn("[bold]PPO"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total, completed=done, numbers="compiling ...")
        self._total = total

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def iterated(self, metrics: Mapping[str, Any]) -> None:
        """Show the numbers of an iteration that is done."""
        numbers = "  ".join(f"{name} {metrics[key]:{form}}" for name, key, form in _WATCHED)
        self._bar.update(self._task, completed=metrics["iteration"], numbers=numbers)

    def evaluated(self, iteration: int, scores: Mapping[str, float]) -> None:
        """One line of an evaluation's means."""
        numbers = "  ".join(f"{name} {value:+.3f}" for name, value in scores.items())
        self.say(f"iteration {iteration:>4}/{self._total}  held out: {numbers}")

    def samples(self, title: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """A table of prompts, completions and scores."""
        table = Table(title=title, box=box.SIMPLE, title_justify="left", show_edge=False)
        table.add_column("prompt and completion", overflow="fold")
        table.add_column("score", justify="right")
        for sample in samples:
            text = f"[dim]{escape(sample['prompt'])}[/]{escape(sample['completion'])}"
            cut = "" if sample["finish_reason"] == "eos" else " [dim]...[/]"
            table.add_row(text + cut, f"{sample['score']:+.2f}")
        self._console.print(table)
