"""Which runs there are, which are done, and the processes that do the others."""

import json
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from learning.settings import BEST_OF_N, SETTINGS, SFT
from qwen_env.errors import UsageError

Record = dict[str, Any]

PPO_SETTINGS = {setting.name: setting for setting in SETTINGS}
NAMES = (*PPO_SETTINGS, BEST_OF_N, *SFT)


@dataclass(frozen=True)
class Job:
    """A setting or a baseline, and a seed. Its fields begin the record of the run."""

    name: str
    seed: int
    iterations: int  # of a setting of length 1
    changes: str  # what the setting was, so that an edited one is run again

    @property
    def cost(self) -> int:
        """About how long it takes, in iterations."""
        if self.name in PPO_SETTINGS:
            return PPO_SETTINGS[self.name].length * self.iterations
        return 40 if self.name == BEST_OF_N else 30 + 3 * SFT[self.name]


def jobs(names: Sequence[str], num_seeds: int, iterations: int) -> list[list[Job]]:
    """One list a name (all of them, if none is given), with a job a seed.

    Raises:
        UsageError: there is no such name.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f"There is no setting {name!r}; choose from: {', '.join(NAMES)}.")

    def of_name(name: str) -> list[Job]:
        changes = PPO_SETTINGS[name].changes if name in PPO_SETTINGS else ""
        return [Job(name, seed, iterations, changes) for seed in range(num_seeds)]

    return [of_name(name) for name in NAMES if name in names or not names]


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


# ---------------------------------------------------------------- processes


class Tick(NamedTuple):
    """So many iterations more are done."""

    iterations: int


class Done(NamedTuple):
    record: Record


class Failed(NamedTuple):
    traceback: str


def run(groups: Sequence[Sequence[Job]], num_processes: int) -> Iterator[Tick | Done]:
    """Do all jobs, a group in one process, and say what happens.

    A model this small is trained faster by processes with a core each than by one that has all.

    Raises:
        RuntimeError: a job failed, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    tasks, messages = context.Queue(), context.Queue()
    num_processes = min(num_processes, len(groups))
    for task in (*groups, *[None] * num_processes):
        tasks.put(task)
    workers = [
        context.Process(target=_work, args=(i, num_processes, tasks, messages), daemon=True)
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


def _work(index: int, num_processes: int, tasks: Any, messages: Any) -> None:
    """Do groups of jobs until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        # Before JAX is imported, which counts them.
        os.sched_setaffinity(0, cores[index % len(cores) :: num_processes])
    from learning import baselines
    from learning.runs import Bench
    from ppo_jax.cli import keep_compiled_programs

    try:
        keep_compiled_programs()
        bench = Bench()
        while (group := tasks.get()) is not None:
            for job in group:
                record = _result(job, bench, baselines, lambda: messages.put(Tick(1)))
                messages.put(Done(asdict(job) | record))
                if job.name not in PPO_SETTINGS:
                    messages.put(Tick(job.cost))
    except BaseException:
        messages.put(Failed(traceback.format_exc()))


def _result(job: Job, bench: Any, baselines: Any, tick: Callable[[], None]) -> Record:
    if job.name == BEST_OF_N:
        return baselines.best_of_n(bench, job.seed)
    if job.name in SFT:
        return baselines.sft(bench, SFT[job.name], job.seed)
    return bench.train(PPO_SETTINGS[job.name], job.iterations, job.seed, tick)
