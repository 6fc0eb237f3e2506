"""Does PPO learn over several turns? In a game, with a tool, and in a trap; over seeds.

    python benchmarks/learning_turns.py --output-dir runs/learning_turns

A tiny model guesses a number that is answered with "higher" or "lower", paid at the end or for each
turn; is blamed for wrong guesses, with and without a price of being cut off; and answers questions
that it cannot compute, with a calculator that it seldom calls at first. The tasks are
`guess_the_number` and `calculator`, as `ppo-train --task` has them.

Every finished run is a line of `runs.jsonl` in the output folder, and is not run again: after an
interruption, the same command goes on. It ends with tables, also as Markdown, and a picture.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from learning.jobs import Job, Record, Tick, Worker, finish
from learning.turns_report import brief, write
from learning.turns_settings import BY_NAME, config, jobs

from ppo_jax.cli import errors_as_sentences
from ppo_jax.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Learning curves over turns."""

    output_dir: Path = Path("runs/learning_turns")
    """Folder that gets runs.jsonl, tables.md and turns.png."""
    settings: tuple[str, ...] = ()
    """Which settings, by name; none is all of them."""
    seeds: int = 5
    """Seeds of each, from 0."""
    iterations: int = 160
    """Iterations of the game; of the trap half as many, of the calculator a fifth."""
    processes: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    """Runs at one time."""


def start() -> Worker:
    """What does jobs in a process; it keeps what they share."""
    from learning.trainer import Trainer
    from learning.turns import make_bench, means

    trainer = Trainer(make_bench, config, means)

    def work(job: Job, tick: Tick) -> Record:
        return trainer.train(BY_NAME[job.name], job.iterations, job.seed, tick)

    return work


def main() -> None:
    with errors_as_sentences():
        arguments = parse(Arguments(), sys.argv[1:], prog="python benchmarks/learning_turns.py")
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
