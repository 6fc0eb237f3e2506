"""Does PPO learn, and what do its knobs do? On the pocket task, over seeds.

    python benchmarks/learning.py --output-dir runs/learning

Trains the preset and the preset with one knob turned, each with the same seeds; draws best-of-n
samples of the untrained model, and fine-tunes it on them. All are measured on the 128 held-out
prompts: the reward model's score (the proxy, which is what is trained on), the grammar's sentiment
(the gold score), KL from the untrained model, entropy, length.

Every finished run is a line of `runs.jsonl` in the output folder, and is not run again: after an
interruption, the same command goes on. It ends with a table, also as Markdown and JSON, and plots.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from learning.jobs import finish
from learning.plan import cost, jobs, start
from learning.plots import plot_all
from learning.report import brief, summarise, write_tables

from ppo_jax.cli import errors_as_sentences
from ppo_jax.flags import parse


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
        arguments = parse(Arguments(), sys.argv[1:], prog="python benchmarks/learning.py")
        groups = jobs(arguments.settings, arguments.seeds, arguments.iterations)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        records = finish(
            groups,
            arguments.output_dir / "runs.jsonl",
            arguments.processes,
            start,
            cost=cost,
            brief=brief,
        )
        summary = summarise(records)
        write_tables(summary, arguments.output_dir)
        plot_all(summary, arguments.output_dir)


if __name__ == "__main__":
    main()
