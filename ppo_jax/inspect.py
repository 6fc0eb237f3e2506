"""Look at single tokens of a run: `ppo-inspect --run runs/pocket` writes a page of HTML."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.inspect()
    raise SystemExit

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppo_jax import cli, flags
from ppo_jax.algorithm import ADVANTAGE_EDGES, RATIO_EDGES
from ppo_jax.config.fields import Checked, Count
from ppo_jax.files import atomic
from ppo_jax.inspector.page import Inspection, RunRecords
from ppo_jax.runs.folder import read_records, read_samples, read_tokens
from ppo_jax.runs.panels import Records
from qwen_env.errors import UsageError

PROG = "ppo-inspect"


@dataclass(frozen=True)
class Arguments(Checked):
    """Write a page that shows a run's episodes token by token: what PPO knows of each, and what
    else was likely."""

    run: str | None = None
    """Folder of a training run."""
    iteration: Count | None = None
    """Iteration to look at: 1, or one that was evaluated; None takes the last of them."""
    output: str | None = None
    """The page to write (.html); None makes it inspect.html in the run's folder."""
    compare: str | None = None
    """Folder of a second run, whose curves and answers to the same prompts are shown beside the
    first one's."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        assert arguments.run is not None
        page = inspect_run(arguments.run, arguments.iteration, arguments.compare).html()
        path = Path(arguments.output or Path(arguments.run, "inspect.html")).expanduser()
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file with --output.")
        with atomic(path) as partial:
            partial.write_text(page, encoding="utf-8", errors="replace")
        print(f"The page is in {path}.")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The flags.

    Raises:
        UsageError: a wrong flag, or no run.
    """
    arguments = flags.parse(Arguments(), argv, prog=PROG)
    if arguments.run is None:
        raise UsageError("There is no run to look at; name its folder, such as --run runs/pocket.")
    return arguments


def inspect_run(
    run: str | Path, iteration: int | None = None, compare: str | Path | None = None
) -> Inspection:
    """An iteration of a run, token by token; a notebook shows it as it is.

    Args:
        run: the run's folder.
        iteration: 1, or one that was evaluated; None takes the last of them.
        compare: the folder of another run.

    Raises:
        UsageError: a folder holds no run, its records cannot be read, or no tokens were kept.
    """
    folder = Path(run).expanduser()
    other = None if compare is None else Path(compare).expanduser()
    records = _read(folder)
    kept = {record["iteration"]: record for record in read_tokens(folder)}
    if not kept:
        raise UsageError(
            f"{folder} has kept no tokens (tokens.jsonl); they are kept unless --inspect-size is 0."
        )
    if iteration is not None and iteration not in kept:
        raise UsageError(
            f"iteration is {iteration}, but the run in {folder} has kept tokens of "
            f"{', '.join(map(str, kept))}; name one of these."
        )
    chosen = kept[max(kept) if iteration is None else iteration]
    number = chosen["iteration"]
    return Inspection(
        chosen,
        _as_read(folder, records),
        distributions=next((d for d in records.distributions if d["iteration"] == number), {}),
        edges={"ratio": RATIO_EDGES.tolist(), "advantage": ADVANTAGE_EDGES.tolist()},
        clip_limits=records.clip_limits,
        other=None if other is None else _as_read(other, _read(other)),
    )


def _read(folder: Path) -> Records:
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} holds no run; name a folder that ppo-train has written (its --output-dir)."
        )
    return read_records(folder)


def _as_read(folder: Path, records: Records) -> RunRecords:
    return RunRecords(str(folder), records.metrics, read_samples(folder))
