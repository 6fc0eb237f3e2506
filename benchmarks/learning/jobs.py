"""Runs that are done or not, and the processes that do those that are not."""

import json
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qwen_env.errors import UsageError

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A setting or a baseline, and a seed. Its fields begin the record of the run."""

    name: str
    seed: int
    iterations: int  # of a setting of length 1
    changes: str  # what the setting was, so that an edited one is run again


class Tick(Protocol):
    """Called in a job when so many iterations more are done."""

    def __call__(self, iterations: int = 1, /) -> None: ...


Worker = Callable[[Job, Tick], Record]
"""Does a job, and returns what the record of the run ends with."""


def read_records(path: Path) -> list[Record]:
    """One a line; the last may have been cut off when the machine went down."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            if i < len(lines) - 1:
                raise UsageError(f"{path}, line {i + 1} is no JSON; remove it.") from None
            path.write_text("".join(line + "\n" for line in lines[:-1]))
    return records


def is_record_of(record: Record, job: Job) -> bool:
    return record.items() >= asdict(job).items()


def finish(
    groups: Sequence[Sequence[Job]],
    path: Path,
    num_processes: int,
    start: Callable[[], Worker],
    *,
    cost: Callable[[Job], int],
    brief: Callable[[Record], str],
) -> list[Record]:
    """Run the jobs that have no record yet, and return the records of all.

    Args:
        groups: see `run`.
        path: of the records; each is added when its run is finished.
        cost: about how long a job takes, in iterations.
        brief: a record in a line.
    """
    known = read_records(path)
    missing = [[job for job in group if not _recorded(job, known)] for group in groups]
    missing = [group for group in missing if group]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("iterations"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    console, total = Console(stderr=True), sum(map(len, missing))
    with (
        Progress(*columns, console=console, speed_estimate_period=900) as progress,
        path.open("a") as file,
    ):
        work = sum(cost(job) for group in missing for job in group)
        task, num_done = progress.add_task(f"0 of {total} runs", total=work), 0
        for message in run(missing, num_processes, start):
            match message:
                case Ticked(iterations):
                    progress.advance(task, iterations)
                case Done(record):
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    known.append(record)
                    num_done += 1
                    progress.update(task, description=f"{num_done} of {total} runs")
                    console.print(f"{record['name']}, seed {record['seed']}: {brief(record)}")
    wanted = [job for group in groups for job in group]
    return [next(r for r in known if is_record_of(r, job)) for job in wanted]


def _recorded(job: Job, records: list[Record]) -> bool:
    return any(is_record_of(record, job) for record in records)


# ---------------------------------------------------------------- processes


class Ticked(NamedTuple):
    """So many iterations more are done."""

    iterations: int


class Done(NamedTuple):
    record: Record


class Failed(NamedTuple):
    traceback: str


def run(
    groups: Sequence[Sequence[Job]], num_processes: int, start: Callable[[], Worker]
) -> Iterator[Ticked | Done]:
    """Do all jobs, a group in one process, and say what happens.

    A model this small is trained faster by processes with a core each than by one that has all.

    Args:
        start: called once in each process, which then knows how many cores it has. It is a
            module's function, and imports JAX itself.

    Raises:
        RuntimeError: a job failed, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    tasks, messages = context.Queue(), context.Queue()
    num_processes = min(num_processes, len(groups))
    for task in (*groups, *[None] * num_processes):
        tasks.put(task)
    workers = [
        context.Process(target=_work, args=(i, num_processes, tasks, messages, start), daemon=True)
        for i in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    remaining = sum(map(len, groups))
    try:
        while remaining:
            try:
                message = messages.get(timeout=2)
            except queue.Empty:
                if died := [worker.exitcode for worker in workers if worker.exitcode]:
                    raise RuntimeError(f"A process ended with status {died[0]}.") from None
                continue
            if isinstance(message, Failed):
                raise RuntimeError(f"A job failed:\n{message.traceback}")
            remaining -= isinstance(message, Done)
            yield message
    finally:
        tasks.cancel_join_thread()
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(
    index: int, num_processes: int, tasks: Any, messages: Any, start: Callable[[], Worker]
) -> None:
    """Do groups of jobs until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        # Before JAX is imported, which counts them.
        os.sched_setaffinity(0, cores[index % len(cores) :: num_processes])
    from ppo_jax.cli import keep_compiled_programs

    def tick(iterations: int = 1, /) -> None:
        messages.put(Ticked(iterations))

    try:
        keep_compiled_programs()
        work = start()
        while (group := tasks.get()) is not None:
            for job in group:
                messages.put(Done(asdict(job) | work(job, tick)))
    except BaseException:
        messages.put(Failed(traceback.format_exc()))
