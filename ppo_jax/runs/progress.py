"""What a person sees while a run goes on: the numbers to watch, evaluations, samples.

On a terminal, two live lines; piped into a file, plain lines. All on stderr.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO, cast

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import MofNCompleteColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ppo_jax.hosts import is_first
from qwen_env.printing import printable

_WATCHED = (  # those that there are, behind the score and its components
    ("loss", "train/loss", ".4f"),
    ("accuracy", "train/accuracy", ".3f"),
    ("KL", "objective/kl", ".2f"),
    ("entropy", "policy/entropy", ".2f"),
    ("length", "rollout/length_mean", ".1f"),
)
_QUIET_SECONDS = 10.0  # between two plain lines
_SAMPLE_CHARACTERS = 400  # of a prompt with its completion, in a table of samples
_COMPONENTS = 3  # of a reward, in a line of an iteration and in a table of samples
_ACCURACY = "accuracy"  # the component that stands first


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
    """A console on stderr that never ends a run; the first process alone speaks."""
    file = None if sys.stderr is None else cast(TextIO, _Lasting(sys.stderr))
    return Console(file=file, stderr=True, highlight=False, quiet=not is_first())


class Progress:
    """Shows a run of `total` iterations; numbers and time begin with the first that is done."""

    def __init__(
        self,
        total: int,
        title: str = "PPO",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or stderr_console()
        self.done = 0
        self._total, self._title, self._clock = total, title, clock
        self._numbers = ""
        self._doing_since: float | None = None  # instead of showing numbers
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
        """Show what is going on, and for how long, instead of the last numbers."""
        self._numbers, self._doing_since = what, self._clock()
        if not self._console.is_interactive:
            self._last_line = self._clock()
            self.say(what)

    def evaluating(self, decoding: str, total: int, done: int) -> None:
        """Show how far an evaluation is; it may take as long as many iterations."""
        self._numbers, self._doing_since = f"evaluating ({decoding}): {done}/{total}", None
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
        names = [name.removeprefix("reward/") for name in metrics if name.startswith("reward/")]
        components = [
            (name, f"reward/{name}", _form(name, 3))
            for name in _accuracy_first(names)
            if name != "gold_std"
        ]
        watched = (("score", "objective/score", "+.3f"), *components[:_COMPONENTS], *_WATCHED)
        self._numbers = "  ".join(
            f"{name} {metrics[key]:{form}}" for name, key, form in watched if key in metrics
        )
        self._doing_since = None
        self._speed = f"{metrics['throughput/tokens_per_s']:,.0f} tokens/s"
        is_due = now - self._last_line >= _QUIET_SECONDS or self.done == self._total
        if is_due and not self._console.is_interactive:
            self._last_line = now
            self.say(f"iteration {self._count()}  {self._numbers}  {self._speed}  {self._left()}")

    def evaluated(self, iteration: int, means: Mapping[str, float]) -> None:
        """One line of an evaluation's scores, which are named as in `metrics.jsonl`."""
        sampled = (name for name in means if name.startswith("sampled/"))
        names = [name.removeprefix("sampled/") for name in sampled]
        components = (x for x in names if x not in ("score", "length_mean", "eos_rate"))
        if names:
            shown = [
                f"{name} {means[f'sampled/{name}']:{_form(name, 3)}}"
                f" (greedy {means[f'greedy/{name}']:{_form(name, 3)}})"
                for name in ("score", *_accuracy_first(components))
            ]
        else:  # nothing was written, what is there was read
            shown = [f"{name} {x:.4f}" for name, x in means.items() if "num_" not in name]
        numbers = "  ".join(shown)
        width = len(str(self._total))
        self.say(f"held out after {iteration:>{width}}: {numbers}")

    def samples(self, title: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """A table of prompts, completions and scores."""
        names = dict.fromkeys(name for sample in samples for name in sample["components"])
        components = _accuracy_first(name for name in names if name != "score")[:_COMPONENTS]
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        table.add_column("prompt and completion", overflow="fold")
        table.add_column("score", justify="right", no_wrap=True)
        for name in components:
            table.add_column(printable(name), justify="right", no_wrap=True)
        for sample in samples:
            prompt = _one_line(sample.get("user_message", sample["prompt"]))
            if len(prompt) > _SAMPLE_CHARACTERS // 2:
                prompt = f"... {prompt[-_SAMPLE_CHARACTERS // 2 :]}"
            completion = _one_line(sample["completion"])
            room = max(_SAMPLE_CHARACTERS - len(prompt), _SAMPLE_CHARACTERS // 2)
            is_whole = sample["finish_reason"] != "length" and len(completion) <= room
            text = Text.assemble((prompt, "dim"), completion[:room], "" if is_whole else " ...")
            parts = ((name, sample["components"].get(name)) for name in components)
            numbers = ("" if x is None else f"{x:{_form(name, 2)}}" for name, x in parts)
            table.add_row(text, f"{sample['score']:+.2f}", *numbers)
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
        first.add_row(f"{self._title} {self._count()}", bar, right)
        numbers = self._numbers
        if self._doing_since is not None:
            numbers += f" {_time(self._clock() - self._doing_since)}"
        return Group(first, Text(numbers, no_wrap=True, overflow="ellipsis"))

    def _count(self) -> str:
        return f"{self.done:>{len(str(self._total))}}/{self._total}"

    def _left(self) -> str:
        if self._ends_at is None:
            return "ETA -:--:--"
        return f"ETA {_time(self._ends_at - self._clock())}"


@contextmanager
def counting(
    what: str,
    total: int,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done, which the given function is told, and the time left.

    On a terminal a bar, which vanishes; piped into a file, plain lines.
    """
    console = console or stderr_console()
    if console.is_interactive:
        columns = (*Bars.get_default_columns(), MofNCompleteColumn())
        with Bars(*columns, console=console, transient=True) as bars:
            bar = bars.add_task(what, total=total)
            yield lambda done: bars.update(bar, completed=done)
        return
    last_line = clock()
    first: tuple[int, float] | None = None  # its time is that of the compilation

    def count(done: int) -> None:
        nonlocal first, last_line
        now = clock()
        if first is None:
            first = done, now
        elif now - last_line >= _QUIET_SECONDS:
            last_line = now
            left = (now - first[1]) / (done - first[0]) * (total - done)
            line = f"{what}: {done}/{total}  ETA {_time(left)}"
            console.print(line, markup=False, soft_wrap=True)

    yield count


def _accuracy_first(components: Iterable[str]) -> list[str]:
    return sorted(components, key=lambda name: name != _ACCURACY)


def _form(component: str, digits: int) -> str:
    """How its numbers are written: shares have no sign."""
    return f".{digits}f" if component == _ACCURACY else f"+.{digits}f"


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(round(seconds), 0)))


def _one_line(text: str) -> str:
    return printable(text).replace("\n", " ⏎ ")
