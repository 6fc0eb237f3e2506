"""Does PPO learn, and what do its knobs do? On the pocket task, over seeds.

    python benchmarks/learning.py --output-dir runs/learning

Trains the preset and the preset with one knob turned, each with the same seeds; draws best-of-n
samples of the untrained model, and fine-tunes it on them. All are measured on the 128 held-out
prompts: the reward model's score (the proxy, which is what is trained on), the grammar's sentiment
(the gold score), KL from the untrained model, entropy, length.

Every finished run is a line of `runs.jsonl` in the output folder, and is not run again: after an
interruption, the same command goes on. It ends with a table, also as Markdown and JSON, and plots.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from learning.jobs import Done, Job, Record, Tick, is_record_of, jobs, read_records, run
from learning.plots import plot_all
from learning.report import brief, summarise, write_tables
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ppo_jax.cli import errors_as_sentences, parse


@dataclass(frozen=True)
class Arguments:
    """Learning curves and ablations on the pocket task."""

    output_dir: Path = Path("runs/learning")
    """Folder that gets runs.jsonl, tables.md, summary.json and the plots."""
    settings: tuple[str, ...] = ()
    """Which settings and baselines, by name; none is all of them."""
    seeds: int = 5
    """Seeds of each, from 0."""
    iterations: int = 30
    """Iterations of PPO; of the longer run, twice as many."""
    processes: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    """Runs at one time."""


def main() -> None:
    with errors_as_sentences():
        arguments = parse(Arguments, sys.argv[1:], prog="python benchmarks/learning.py")
        groups = jobs(arguments.settings, arguments.seeds, arguments.iterations)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        records = finish(groups, arguments.output_dir / "runs.jsonl", arguments.processes)
        summary = summarise(records)
        write_tables(summary, arguments.output_dir)
        plot_all(summary, arguments.output_dir)


def finish(groups: list[list[Job]], path: Path, num_processes: int) -> list[Record]:
    """Run the jobs that have no record yet, and return the records of all."""
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
        work = sum(job.cost for group in missing for job in group)
        task, num_done = progress.add_task(f"0 of {total} runs", total=work), 0
        for message in run(missing, num_processes):
            match message:
                case Tick(iterations):
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


if __name__ == "__main__":
    main()
