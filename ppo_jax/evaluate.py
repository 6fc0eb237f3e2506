"""Score a model: `ppo-evaluate --run runs/pocket`, or `--model FOLDER --reward SPEC ...`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.evaluate()
    raise SystemExit

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from ppo_jax import cli, flags
from ppo_jax.assembly import assemble
from ppo_jax.config import SamplingConfig, TaskConfig
from ppo_jax.config.fields import Checked, Count, Seed, part_of
from ppo_jax.generation.actor import Actor
from ppo_jax.generation.episode_metrics import evaluation_means
from ppo_jax.runs.progress import stderr_console
from ppo_jax.runs.trained import TrainedRun, named_run
from qwen_env import pocket
from qwen_env.errors import UsageError

PROG = "ppo-evaluate"

_MAY_DIFFER = {
    "model",
    "task",
    "eval_prompts",
    "prompts",
    "max_prompt_length",
    "prompt_overflow",
    "reward",
    "gold_reward",
}
"""What another evaluation of a run may change; the rest says how its model writes and is scored."""


@dataclass(frozen=True)
class EvaluatedTask(TaskConfig):
    """What the model is asked, and what its answers are worth."""

    prompts: str | None = str(pocket.HELDOUT_PROMPTS)
    """Prompts: a .jsonl file whose objects hold "prompt" (text) or "messages" (a chat). With --run,
    None takes those that the run held out."""
    eval_prompts: str | None = flags.hidden(None)
    max_prompt_length: Count | None = None
    """Longest prompt, in tokens; None takes prompts of any length."""


@dataclass(frozen=True)
class Arguments(Checked):
    """Score a model's responses to prompts, both greedy and sampled.

    With a run, the settings are those that it was trained with.
    """

    run: str | None = None
    """Folder of a training run that gives the model, its held-out prompts, rewards and all other
    settings."""
    which: str | None = None
    """Model of the run: final, best, or the iteration of a checkpoint; None takes the final one if
    the run has finished."""
    task: EvaluatedTask = field(default_factory=EvaluatedTask)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_size: Count = 16
    """Responses generated at a time."""
    seed: Seed = 0
    """Seed of the sampled responses."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments, run = parse_arguments(sys.argv[1:] if argv is None else argv)
        cli.keep_compiled_programs()
        cli.find_devices()
        means = evaluate(arguments, run)
        if arguments.json:
            print(json.dumps(means))
            return
        table = Table("", *means, box=box.SIMPLE_HEAD)
        for name in means["greedy"]:
            table.add_row(name, *(f"{column[name]:.4f}" for column in means.values()))
        Console().print(table)


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, TrainedRun | None]:
    """The flags, over the settings of the run where they name one.

    Raises:
        UsageError: a wrong flag, no such run, or a flag that contradicts the run's settings.
    """
    run = named_run(argv)
    if run is None:
        return flags.parse(Arguments(), argv, prog=PROG), None
    theirs = dataclasses.asdict(run.config.task) | {"prompts": None, "max_prompt_length": None}
    default = Arguments(
        task=EvaluatedTask(**theirs), sampling=part_of(run.config.ppo, SamplingConfig)
    )
    arguments = flags.parse(default, argv, prog=PROG)
    for given, trained_with in (
        (arguments.task, default.task),
        (arguments.sampling, default.sampling),
    ):
        for name in dataclasses.asdict(given):
            value, theirs = getattr(given, name), getattr(trained_with, name)
            if value != theirs and name not in _MAY_DIFFER:
                raise UsageError(
                    f"{name} is {value!r}, but the run was trained with {theirs!r}; leave the flag "
                    f"out, or evaluate the model on its own: --model {run.folder / 'final'}."
                )
    task = replace(arguments.task, model=run.model)
    return replace(arguments, task=task), run


def evaluate(arguments: Arguments, run: TrainedRun | None = None) -> dict[str, dict[str, float]]:
    """Means of the greedy and the sampled responses; see `episode_metrics.evaluation_means`.

    Args:
        run: whose held-out prompts are answered where the arguments name none.

    Raises:
        UserFacingError: an argument, the model, the prompts or the reward is wrong.
    """
    settings, prompts, dtype = arguments.task, arguments.task.prompts, "float32"
    if run is not None:
        if settings.task is None:
            settings = replace(settings, prompts=run.config.task.prompts)
        dtype = run.config.run.dtype
    network, task, held_out = assemble(settings, prompts=prompts, dtype=dtype, say=cli.say)
    if run is not None:
        network = run.trained(network, task)
    asked = task.prompts if held_out is None else held_out
    actor = Actor(network, task, arguments.sampling.sampling)

    def means(decoding: str) -> dict[str, float]:
        bar = progress.add_task(decoding, total=len(asked))
        _, outcomes = actor.respond_to_all(
            nnx.state(network),
            asked,
            jax.random.key(arguments.seed),
            batch_size=arguments.batch_size,
            greedy=decoding == "greedy",
            on_batch=lambda done: progress.update(bar, completed=done),
        )
        return evaluation_means(outcomes)

    console = stderr_console()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_interactive
    ) as progress:
        return {decoding: means(decoding) for decoding in ("greedy", "sampled")}
