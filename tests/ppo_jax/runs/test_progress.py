import io
import os
import sys
from typing import Any

import pytest
from rich.console import Console

from ppo_jax.runs.progress import Progress, counting


def metrics(iteration: int, **changes: float) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "objective/score": 0.1234,
        "objective/kl": 1.5,
        "policy/entropy": 2.25,
        "rollout/length_mean": 18.04,
        "throughput/tokens_per_s": 12345.6,
    } | changes


def sample(completion: str, prompt: str = "The plot", gold: bool = True) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "completion": completion,
        "finish_reason": "eos",
        "score": 1.5,
        "components": {"score": 1.5} | ({"gold": -0.25} if gold else {}),
    }


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def plain(width: int = 80) -> tuple[Progress, io.StringIO, Clock]:
    """Piped into a file."""
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, width=width, highlight=False)
    return Progress(100, console=console, clock=clock), file, clock


def live(width: int) -> tuple[Progress, Console, Clock]:
    """On a terminal."""
    clock = Clock()
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, _environ={}
    )
    return Progress(100, console=console, clock=clock), console, clock


def test_plain_lines_come_at_most_every_ten_seconds_and_at_the_end() -> None:
    progress, file, clock = plain()
    with progress:
        for iteration in range(1, 101):
            clock.seconds += 0.5
            progress.iterated(metrics(iteration))
    lines = file.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 21, 41, 61, 81, 100]
    assert lines[1] == (
        "iteration  21/100  score +0.123  KL 1.50  entropy 2.25  length 18.0  12,346 tokens/s  "
        "ETA 0:00:40"
    )
    assert lines[-1].endswith("ETA 0:00:00")
    assert "\x1b" not in file.getvalue()
    assert "━" not in file.getvalue()


def test_supervised_learning_has_numbers_of_its_own() -> None:
    progress, file, _ = plain()
    numbers = {"train/loss": 0.5, "train/accuracy": 0.75, "throughput/tokens_per_s": 1000.0}
    progress.iterated({"iteration": 1, **numbers})
    progress.evaluated(1, {"loss": 0.25, "accuracy": 0.875, "num_pairs": 200.0})
    assert file.getvalue().splitlines() == [
        "iteration   1/100  loss 0.5000  accuracy 0.750  1,000 tokens/s  ETA -:--:--",
        "held out after   1: loss 0.2500  accuracy 0.8750",
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_live_lines_fit_and_show_the_numbers(width: int) -> None:
    progress, console, clock = live(width)
    clock.seconds = 60.0  # compiling
    progress.iterated(metrics(98))
    clock.seconds += 7200.0
    progress.iterated(metrics(99))
    with console.capture() as capture:
        console.print(progress._lines())
    first, second = capture.get().splitlines()
    assert len(first) <= width
    assert "99/100" in first
    assert first.rstrip().endswith("12,346 tokens/s  ETA 2:00:00")
    assert first.count("━") > 10, "there is room for a bar"
    assert second.rstrip() == "score +0.123  KL 1.50  entropy 2.25  length 18.0"


def test_time_left_leaves_out_the_first_iteration_and_runs_down() -> None:
    progress, file, clock = plain()
    clock.seconds = 300.0  # a long compilation
    progress.iterated(metrics(10))
    assert "ETA -:--:--" in file.getvalue()
    clock.seconds += 20.0
    progress.iterated(metrics(20))
    assert progress._left() == "ETA 0:02:40"
    clock.seconds += 10.0
    assert progress._left() == "ETA 0:02:30"
    clock.seconds += 1000.0
    assert progress._left() == "ETA 0:00:00"


def test_a_reader_that_goes_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `2>&1 | head`."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress(100)
        progress.say("first")
        assert os.read(reader, 100) == b"first\n"
        os.close(reader)
        with progress:
            progress.iterated(metrics(1))
            progress.say("more")


def test_what_takes_long_is_not_silent() -> None:
    progress, file, clock = plain()
    progress.doing("compiling ...")
    for done in range(4, 33, 4):
        clock.seconds += 3.0
        progress.evaluating("greedy", 32, done)
    assert file.getvalue().splitlines() == [
        "compiling ...",
        "evaluating (greedy): 16/32",
        "evaluating (greedy): 32/32",
    ]


def test_evaluations() -> None:
    progress, file, _ = plain()
    means = {"sampled/score": 0.25, "greedy/score": -0.5, "sampled/length_mean": 3.0}
    progress.evaluated(10, means)
    progress.evaluated(20, means | {"sampled/gold": 1.0, "greedy/gold": 2.0})
    assert file.getvalue().splitlines() == [
        "held out after  10: score +0.250 (greedy -0.500)",
        "held out after  20: score +0.250 (greedy -0.500)  gold +1.000 (greedy +2.000)",
    ]


def test_accuracy_stands_beside_the_score() -> None:
    progress, file, _ = plain(width=120)
    others = {"reward/a": 1.0, "reward/b": 2.0, "reward/c": 3.0}
    progress.iterated(metrics(100, **others, **{"reward/accuracy": 0.25}))
    means = {"sampled/score": 0.25, "sampled/a": 1.0, "sampled/accuracy": 0.5, "num_prompts": 64}
    means |= {"greedy/score": -0.5, "greedy/a": 2.0, "greedy/accuracy": 0.625}
    progress.evaluated(100, means)
    marked = sample("4", gold=False)
    marked["components"] |= {"a": 1.0, "b": 2.0, "c": 3.0, "accuracy": 1.0}
    progress.samples("After", [marked])
    iteration, held_out, *table = file.getvalue().splitlines()
    numbers = "score +0.123  accuracy 0.250  a +1.000  b +2.000  KL 1.50"
    assert iteration.startswith(f"iteration 100/100  {numbers}")
    assert held_out == (
        "held out after 100: score +0.250 (greedy -0.500)  accuracy 0.500 (greedy 0.625)  "
        "a +1.000 (greedy +2.000)"
    )
    assert any(
        line.split() == ["The", "plot4", "+1.50", "1.00", "+1.00", "+2.00"] for line in table
    )


def test_counting_says_how_far_it_is_and_how_long_it_will_take() -> None:
    """The first batch compiles, so its time says nothing."""
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, width=80, highlight=False)
    with counting("greedy", 100, console=console, clock=clock) as count:
        clock.seconds = 300.0
        count(10)
        for done in range(20, 101, 10):
            clock.seconds += 6.0
            count(done)
    assert file.getvalue().splitlines() == [
        "greedy: 20/100  ETA 0:00:48",
        "greedy: 40/100  ETA 0:00:36",
        "greedy: 60/100  ETA 0:00:24",
        "greedy: 80/100  ETA 0:00:12",
        "greedy: 100/100  ETA 0:00:00",
    ]


def test_samples_fit_and_are_harmless() -> None:
    progress, file, _ = plain()
    wild = "[red]bold[/] \x1b[31m\x07 tab\t line\nnext \u202e [/x"
    progress.samples("Before", [sample(wild), sample("word " * 200), sample("good", gold=True)])
    shown = file.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "[red]bold[/]" in shown, "what a model writes is no markup"
    for character in "\x1b\x07\t\u202e":
        assert character not in shown
    assert "line ⏎ next" in shown
    assert 70 < shown.count("word") < 90, "long ones are cut"
    assert "+1.50" in shown
    assert "-0.25" in shown


def test_samples_without_a_gold_score_have_no_column_for_it() -> None:
    progress, file, _ = plain()
    progress.samples("Before", [sample("fine", gold=False)])
    assert "gold" not in file.getvalue()
