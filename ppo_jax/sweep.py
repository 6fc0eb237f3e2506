"""Train with several seeds, and several settings: `ppo-sweep --seeds 0 1 2 -- --preset pocket`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.sweep()
    raise SystemExit

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from rich.console import Console

from ppo_jax import cli, flags, reward_model, sft, train
from ppo_jax.config.fields import Checked, Seed
from ppo_jax.files import atomic, disk_errors, write_json
from ppo_jax.runs.comparison import Runs, compare, draw, markdown, table
from ppo_jax.runs.folder import read_records
from ppo_jax.runs.interruption import EXIT_STATUS
from qwen_env.errors import RunError, UsageError
from qwen_env.files import read_json, read_text

PROG = "ppo-sweep"

_OWN = ("--seed", "--output-dir", "--resume")  # flags that the sweep gives itself

_MODULES: dict[str, ModuleType] = {
    "ppo-train": train,
    "ppo-sft": sft,
    "ppo-reward-model": reward_model,
}


@dataclass(frozen=True)
class Arguments(Checked):
    """Train with several seeds, and if there is a file of settings with each of them; end with a
    table and a plot of what they come to, with 95 % intervals over the seeds."""

    output_dir: Path = Path("runs/sweep")
    """Folder of the sweep: each run has a folder in it, and so have sweep.md and sweep.png."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds that each setting is trained with."""
    command: Literal["ppo-train", "ppo-sft", "ppo-reward-model"] = "ppo-train"
    """What trains."""
    settings: str | None = None
    """A file of settings, one a line: a name, and flags of the command ("long --max-new-tokens
    64"). The others are compared with the first. None is one setting, without flags of its own."""
    train: tuple[str, ...] = flags.positional("-- FLAG")
    """Flags of the command for all runs, behind --."""


class Job(NamedTuple):
    """One run: its command, setting, seed and folder, and the words of the command."""

    command: str
    setting: str
    seed: int
    folder: Path
    words: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        jobs = make_jobs(arguments)
        begin(arguments.output_dir, jobs)
        for number, job in enumerate(jobs, start=1):
            if not is_done(job):
                cli.say(f"Run {number} of {len(jobs)}: {job.folder}")
                run(job)
        Console(markup=False).print(finish(arguments.output_dir, jobs))


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The flags.

    Raises:
        UsageError: a wrong flag, no seed, or one twice.
    """
    arguments = flags.parse(Arguments(), argv, prog=PROG)
    if not arguments.seeds:
        raise UsageError("There is no seed; name some, such as --seeds 0 1 2.")
    for seed in arguments.seeds:
        if arguments.seeds.count(seed) > 1:
            raise UsageError(f"Seed {seed} stands there twice; leave one of the two out.")
    return arguments


def make_jobs(arguments: Arguments) -> list[Job]:
    """Every setting with every seed, a seed of all settings before the next seed.

    Raises:
        UsageError: a file of settings, or a flag of the command, is wrong.
    """
    settings = {"run": []} if arguments.settings is None else _read(Path(arguments.settings))
    jobs = []
    for name, own in settings.items():
        words = [*arguments.train, *own]
        for word in words:
            if (flag := word.split("=")[0].replace("_", "-")) in _OWN:
                raise UsageError(f"{name}: {flag} is what the sweep says itself; leave it out.")
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"{name}-seed{seed}"
            more = ["--seed", str(seed), "--output-dir", str(folder)]
            _MODULES[arguments.command].parse_arguments([*words, *more])
            jobs.append(Job(arguments.command, name, seed, folder, [*words, *more]))
    return sorted(jobs, key=lambda job: arguments.seeds.index(job.seed))


def _read(path: Path) -> dict[str, list[str]]:
    """Names and flags of a file of settings."""
    settings: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        place = f"line {number} of {path}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{place} cannot be read: {error}.") from error
        if not words:
            continue
        name, *own = words
        if name.startswith("-") or "/" in name:
            raise UsageError(f"{place} begins with {name!r}; a name goes first, then flags.")
        if name in settings:
            raise UsageError(f"{place} is named {name!r}, as one before it is; choose another.")
        settings[name] = own
    if not settings:
        raise UsageError(f"{path} has no setting; write one a line: a name, then flags.")
    return settings


def begin(folder: Path, jobs: Sequence[Job]) -> None:
    """Write down what the sweep is made of; what an earlier start wrote must agree.

    Raises:
        UsageError: a run that is there was begun with other flags.
    """
    path = folder / "sweep.json"
    known = read_json(path)
    words = {job.folder.name: shlex.join(job.words) for job in jobs}
    for name, now in words.items():
        if known.get(name, now) != now:
            raise UsageError(
                f"{folder / name} was begun with other flags ({known[name]}); go on with those, or "
                "choose another --output-dir."
            )
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        write_json(partial, known | words)


def is_done(job: Job) -> bool:
    """Whether the run has come to its end."""
    return (job.folder / "final").is_dir()


def run(job: Job) -> None:
    """Train in a process of its own, from where an earlier start was interrupted.

    Raises:
        RunError: the run ended with an error, which it has said itself.
        SystemExit: it was interrupted, and is saved.
    """
    resume = ["--resume"] if (job.folder / "config.json").exists() else []
    # Ctrl-C reaches both processes: the run saves, and this one waits for it.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        words = [*job.words, *resume]
        module = _MODULES[job.command].__name__
        status = subprocess.Popen([sys.executable, "-m", module, *words]).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if status == EXIT_STATUS:
        raise SystemExit(EXIT_STATUS)
    if status:
        raise RunError(
            f"The run in {job.folder} ended with status {status}; mend what it says, and the same "
            "command goes on."
        )


def finish(folder: Path, jobs: Sequence[Job]) -> object:
    """Write `sweep.md` and `sweep.png`; returns the table."""
    runs: Runs = {}
    for job in jobs:
        runs.setdefault(job.setting, {})[job.seed] = read_records(job.folder).metrics
    rows = compare(runs)
    with atomic(folder / "sweep.md") as partial:
        partial.write_text(markdown(rows), encoding="utf-8")
    draw(runs, folder / "sweep.png")
    cli.say(f"The table is in {folder / 'sweep.md'}, the plot in {folder / 'sweep.png'}.")
    return table(rows)
