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
from typing import Any, NamedTuple

import jax
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from ppo_jax import cli, flags
from ppo_jax.assembly import assemble
from ppo_jax.config import DevicesConfig, SamplingConfig, TaskConfig
from ppo_jax.config.fields import Checked, Count, Seed, Share, part_of
from ppo_jax.generation.actor import Actor
from ppo_jax.generation.episode_metrics import (
    evaluation_intervals,
    evaluation_means,
    is_right_or_wrong,
    repeated_answers,
)
from ppo_jax.generation.intervals import Interval, share_interval
from ppo_jax.mesh import make_mesh
from ppo_jax.models.loading import model_in
from ppo_jax.runs.progress import counting
from ppo_jax.runs.trained import TrainedRun, named_run
from qwen_env import pocket
from qwen_env.episodes import Outcome
from qwen_env.errors import UsageError
from qwen_env.task import TextTask

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
    keep_solvable: tuple[Share, Share] | None = flags.hidden(None)


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
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    samples: Count = 1
    """Sample this many responses to each prompt. Where the reward reports an accuracy, report the
    mean accuracy (mean@k), how often one of k is right (pass@k), and how often the answer given
    most often is (maj@k)."""
    batch_size: Count = 16
    """Responses generated at a time; all samples of a prompt are generated together."""
    seed: Seed = 0
    """Seed of the sampled responses."""
    json: bool = False
    """Print one JSON object instead of a table."""


class Evaluation(NamedTuple):
    """What was measured, by decoding ("greedy", "sampled") and name; intervals are of 95 %."""

    means: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, Interval | None]]
    num_prompts: int
    samples: int  # sampled responses to each prompt

    def as_json(self) -> dict[str, Any]:
        """Means under "greedy" and "sampled", and how sure they are beside them."""
        return self.means | {
            "intervals": self.intervals,
            "num_prompts": self.num_prompts,
            "samples": self.samples,
        }

    def as_table(self) -> Table:
        """A row for each name, a column for each decoding: "0.412 [0.353, 0.474]"."""
        prompts = f"{self.num_prompts} prompt{'s' if self.num_prompts > 1 else ''}"
        samples = f", {self.samples} samples of each" if self.samples > 1 else ""
        table = Table(
            "",
            *self.means,
            title=f"{prompts}{samples}; in brackets 95 % confidence intervals, over prompts",
            title_justify="left",
            title_style="",
            box=box.SIMPLE_HEAD,
        )
        for name in dict.fromkeys(name for means in self.means.values() for name in means):
            table.add_row(name, *(self._cell(decoding, name) for decoding in self.means))
        return table

    def _cell(self, decoding: str, name: str) -> str:
        if name not in self.means[decoding]:
            return ""
        interval = self.intervals[decoding][name]
        ends = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        return f"{self.means[decoding][name]:.3f}{ends}"


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments, run = parse_arguments(sys.argv[1:] if argv is None else argv)
        cli.keep_compiled_programs()
        cli.find_devices()
        evaluation = evaluate(arguments, run)
        if arguments.json:
            print(json.dumps(evaluation.as_json()))
        else:
            Console(markup=False).print(evaluation.as_table())


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, TrainedRun | None]:
    """The flags, over the settings of the run where they name one.

    Raises:
        UsageError: a wrong flag, no such run, or a flag that contradicts the run's settings.
    """
    run = named_run(argv)
    if run is None:
        arguments = flags.parse(Arguments(), argv, prog=PROG)
        task = replace(arguments.task, model=model_in(arguments.task.model))
        return replace(arguments, task=task), None
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


def evaluate(arguments: Arguments, run: TrainedRun | None = None) -> Evaluation:
    """Let a model answer prompts, greedily and by sampling, and say what that comes to.

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
    devices = arguments.devices
    devices.check_slots(arguments.batch_size)
    mesh = make_mesh(devices.num_devices, devices.num_shards)
    network, task, held_out = assemble(
        settings, prompts=prompts, dtype=dtype, mesh=mesh, say=cli.say
    )
    if run is not None:
        network = run.trained(network, task, devices)
    asked = task.prompts if held_out is None else held_out
    actor = Actor(
        network, task, arguments.sampling.sampling, num_slots=devices.rollout_slots, mesh=mesh
    )
    means: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Interval | None]] = {}
    for decoding, samples in (("greedy", 1), ("sampled", arguments.samples)):
        with counting(decoding, len(asked)) as count:
            _, outcomes = actor.respond_to_all(
                nnx.state(network),
                asked,
                jax.random.key(arguments.seed),
                batch_size=max(arguments.batch_size // samples, 1),
                completions_per_prompt=samples,
                greedy=decoding == "greedy",
                on_batch=count,
            )
        means[decoding] = evaluation_means(outcomes)
        intervals[decoding] = evaluation_intervals(outcomes, samples)
        if samples > 1:
            shares = _repeated_answers(outcomes, samples, task)
            means[decoding] |= {name: float(x.mean()) for name, x in shares.items()}
            intervals[decoding] |= {name: share_interval(x, samples) for name, x in shares.items()}
    return Evaluation(means, intervals, len(asked), arguments.samples)


def _repeated_answers(outcomes: Sequence[Outcome], samples: int, task: TextTask) -> dict[str, Any]:
    """mean@k, pass@k and maj@k, or nothing for answers that are not simply right or wrong."""
    if not is_right_or_wrong(outcomes):
        cli.say(
            "There is no pass@k and no maj@k: the reward does not report an accuracy of 0 or 1 for "
            "each answer."
        )
        return {}
    if task.answer_of is None:
        cli.say("There is no maj@k: the task does not say which answer a completion gives.")
    return repeated_answers(outcomes, samples, task.answer_of)
