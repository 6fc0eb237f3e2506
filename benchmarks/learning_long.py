"""Does a critic earn its keep where answers are long and rewards rare? Over seeds.

    python benchmarks/learning_long.py --output-dir runs/learning_long

A tiny model writes 64 symbols, and is paid at the end if the good ones among them prevail. PPO's
value function, and what improves it, against advantages among the answers to a prompt: at equal
samples, and at equal time.

Every finished run is a line of `runs.jsonl` in the output folder, and is not run again: after an
interruption, the same command goes on. It ends with tables, also as Markdown, and a picture.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from learning.jobs import Job, Record, Tick, Worker, finish
from learning.long_answers_report import brief, write
from learning.long_answers_settings import BY_NAME, config, jobs

from ppo_jax.cli import errors_as_sentences
from ppo_jax.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Learning curves on long answers."""

    output_dir: Path = Path("runs/learning_long")
    """Folder that gets runs.jsonl, tables.md and long_answers.png."""
    settings: tuple[str, ...] = ()
    """Which settings, by name; none is all of them."""
    seeds: int = 5
    """Seeds of each, from 0."""
    iterations: int = 30
    """Iterations of a run, of 256 answers each."""
    processes: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    """Runs at one time."""


def start() -> Worker:
    """What does jobs in a process; it keeps what they share."""
    from learning.long_answers import make_bench, means
    from learning.trainer import Trainer

    trainer = Trainer(make_bench, config, means)

    def work(job: Job, tick: Tick) -> Record:
        return trainer.train(BY_NAME[job.name], job.iterations, job.seed, tick)

    return work


def main() -> None:
    with errors_as_sentences():
        arguments = parse(Arguments(), sys.argv[1:], prog="python benchmarks/learning_long.py")
        groups = jobs(arguments.settings, arguments.seeds, arguments.iterations)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        records = finish(
            groups,
            arguments.output_dir / "runs.jsonl",
            arguments.processes,
            start,
            cost=lambda job: job.iterations,
            brief=brief,
        )
        write(records, arguments.output_dir)


if __name__ == "__main__":
    main()
