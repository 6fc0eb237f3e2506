"""What a person sees while a run goes on: the numbers to watch, evaluations, samples.

On a terminal, two live lines; piped into a file, plain lines. All on stderr.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO, cast

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qwen_env.rendering import printable

_WATCHED = (
    ("score", "objective/score", "+.3f"),
    ("KL", "objective/kl", ".2f"),
    ("entropy", "policy/entropy", ".2f"),
    ("length", "rollout/length_mean", ".1f"),
)
_QUIET_SECONDS = 10.0  # between two plain lines
_SAMPLE_CHARACTERS = 400  # of a prompt with its completion, in a table of samples


class _Lasting:
    """A stream that outlives its reader (as in `2>&1 | head`): what is written then is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # What is in the buffer must have a place to go, at the latest when Python exits.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def stderr_console() -> Console:
    """A console on stderr that never ends a run."""
    file = None if sys.stderr is None else cast(TextIO, _Lasting(sys.stderr))
    return Console(file=file, stderr=True, highlight=False)


class Progress:
    """Shows a run of `total` iterations; numbers and time begin with the first that is done."""

    def __init__(
        self,
        total: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or stderr_console()
        self.done = 0
        self._total, self._clock = total, clock
        self._numbers = ""
        self._speed = ""
        # The first iteration compiles: its time says nothing about the others'.
        self._timed_from: tuple[int, float] | None = None
        self._ends_at: float | None = None
        self._last_line = -_QUIET_SECONDS
        self._live = Live(
            console=self._console, get_renderable=self._lines, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line above the live ones."""
        self._console.print(text, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        """Show what is going on instead of the last numbers."""
        self._numbers = what
        if not self._console.is_interactive:
            self._last_line = self._clock()
            self.say(what)

    def evaluating(self, decoding: str, total: int, done: int) -> None:
        """Show how far an evaluation is; it may take as long as many iterations."""
        self._numbers = f"evaluating ({decoding}): {done}/{total}"
        now = self._clock()
        if not self._console.is_interactive and now - self._last_line >= _QUIET_SECONDS:
            self._last_line = now
            self.say(self._numbers)

    def iterated(self, metrics: Mapping[str, Any]) -> None:
        """Show the numbers of an iteration that is done."""
        now, self.done = self._clock(), metrics["iteration"]
        if self._timed_from is None:
            self._timed_from = self.done, now
        else:
            first, start = self._timed_from
            mean = (now - start) / (self.done - first)  # evaluations included
            self._ends_at = now + mean * (self._total - self.done)
        self._numbers = "  ".join(f"{name} {metrics[key]:{form}}" for name, key, form in _WATCHED)
        self._speed = f"{metrics['throughput/tokens_per_s']:,.0f} tokens/s"
        is_due = now - self._last_line >= _QUIET_SECONDS or self.done == self._total
        if is_due and not self._console.is_interactive:
            self._last_line = now
            self.say(f"iteration {self._count()}  {self._numbers}  {self._speed}  {self._left()}")

    def evaluated(self, iteration: int, means: Mapping[str, float]) -> None:
        """One line of an evaluation's means, which are named as in `metrics.jsonl`."""
        numbers = "  ".join(
            f"{name} {means[f'sampled/{name}']:+.3f} (greedy {means[f'greedy/{name}']:+.3f})"
            for name in ("score", "gold")
            if f"sampled/{name}" in means
        )
        width = len(str(self._total))
        self.say(f"held out after {iteration:>{width}}: {numbers}")

    def samples(self, title: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """A table of prompts, completions and scores."""
        has_gold = any("gold" in sample["components"] for sample in samples)
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        table.add_column("prompt and completion", overflow="fold")
        table.add_column("score", justify="right", no_wrap=True)
        if has_gold:
            table.add_column("gold", justify="right", no_wrap=True)
        for sample in samples:
            prompt = _one_line(sample["prompt"])
            completion = _one_line(sample["completion"])
            room = max(_SAMPLE_CHARACTERS - len(prompt), _SAMPLE_CHARACTERS // 2)
            is_whole = sample["finish_reason"] != "length" and len(completion) <= room
            text = Text.assemble((prompt, "dim"), completion[:room], "" if is_whole else " ...")
            gold = [f"{sample['components']['gold']:+.2f}"] if has_gold else []
            table.add_row(text, f"{sample['score']:+.2f}", *gold)
        self._console.print(table)

    def leave(self) -> None:
        """Give the terminal back in order; the process ends in the middle of things."""
        self.say("Left without saving.")
        if self._console.is_interactive:
            self._console.show_cursor(True)
            print(file=self._console.file, flush=True)

    def _lines(self) -> Group:
        first = Table.grid(padding=(0, 2), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=self._total, completed=self.done, complete_style="cyan")
        right = "  ".join(filter(None, (self._speed, self._left())))
        first.add_row(f"PPO {self._count()}", bar, right)
        return Group(first, Text(self._numbers, no_wrap=True, overflow="ellipsis"))

    def _count(self) -> str:
        return f"{self.done:>{len(str(self._total))}}/{self._total}"

    def _left(self) -> str:
        if self._ends_at is None:
            return "ETA -:--:--"
        seconds = max(round(self._ends_at - self._clock()), 0)
        return f"ETA {datetime.timedelta(seconds=seconds)}"


def _one_line(text: str) -> str:
    return printable(text).replace("\n", " ⏎ ")
