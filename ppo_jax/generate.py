"""Talk to a model: `ppo-generate --run runs/pocket "The plot was"`, or `--model FOLDER "..."`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.generate()
    raise SystemExit

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from flax import nnx

from ppo_jax import cli, flags
from ppo_jax.assembly import assemble
from ppo_jax.config import DevicesConfig, ResponseConfig, SamplingConfig, TaskConfig
from ppo_jax.config.fields import Checked, Seed, part_of
from ppo_jax.generation.actor import Actor
from ppo_jax.mesh import make_mesh
from ppo_jax.models.loading import model_in
from ppo_jax.runs.trained import TrainedRun, named_run
from qwen_env.errors import UsageError
from qwen_env.rewards import RewardBatch

PROG = "ppo-generate"


@dataclass(frozen=True)
class Arguments(Checked):
    """Complete prompts with a language model. With a run, in the way that it was trained."""

    prompts: tuple[str, ...] = flags.positional("PROMPT")
    """What to complete."""
    run: str | None = None
    """Folder of a training run that gives the model and the defaults of the other flags."""
    which: str | None = None
    """Model of the run: final, best, or the iteration of a checkpoint; None takes the final one if
    the run has finished."""
    response: ResponseConfig = field(default_factory=lambda: ResponseConfig(max_new_tokens=64))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    greedy: bool = False
    """Take the most probable token each time instead of sampling."""
    seed: Seed = 0
    """Seed of the sampled responses."""
    json: bool = False
    """Print one JSON object per line: prompt, completion, finish_reason."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments, run = parse_arguments(sys.argv[1:] if argv is None else argv)
        cli.keep_compiled_programs()
        cli.find_devices()
        for record in generate(arguments, run):
            if arguments.json:
                print(json.dumps(record, ensure_ascii=False))
            elif arguments.response.chat:
                print(record["completion"])
            else:
                print(record["prompt"] + record["completion"])


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, TrainedRun | None]:
    """The flags, over the settings of the run where they name one.

    Raises:
        UsageError: a wrong flag, no such run, or flags that exclude each other.
    """
    default = Arguments()
    if (run := named_run(argv)) is not None:
        default = replace(
            default,
            response=part_of(run.config.task, ResponseConfig),
            sampling=part_of(run.config.ppo, SamplingConfig),
        )
    arguments = flags.parse(default, argv, prog=PROG)
    model = model_in(arguments.response.model) if run is None else run.model
    arguments = replace(arguments, response=replace(arguments.response, model=model))
    for name, value in dataclasses.asdict(arguments.sampling).items():
        if arguments.greedy and value != getattr(default.sampling, name):
            raise UsageError(f"greedy and {name} exclude each other; leave one of them out.")
    return arguments, run


def generate(arguments: Arguments, run: TrainedRun | None = None) -> list[dict[str, str]]:
    """One record per prompt: `prompt`, `completion`, `finish_reason`.

    Raises:
        UserFacingError: an argument or the model is wrong.
    """
    response = arguments.response
    for name in ("system_prompt", "chat_template_kwargs"):
        if getattr(response, name) and not response.chat:
            raise UsageError(
                f"{name} is set, which only a chat has; add --chat, or leave {name} out."
            )
    if not arguments.prompts:
        raise UsageError(f"There is no prompt; give one or more: {PROG} 'The plot'.")
    settings = TaskConfig(**dataclasses.asdict(response), max_prompt_length=None)
    devices = arguments.devices
    devices.check_slots(len(arguments.prompts))
    mesh = make_mesh(devices.num_devices, devices.num_shards)
    network, task, _ = assemble(settings, prompts=arguments.prompts, reward=_nothing, mesh=mesh)
    if run is not None:
        network = run.trained(network, task, devices)
    actor = Actor(
        network, task, arguments.sampling.sampling, num_slots=devices.rollout_slots, mesh=mesh
    )
    _, outcomes = actor.respond_to_all(
        nnx.state(network),
        task.prompts,
        jax.random.key(arguments.seed),
        batch_size=len(task.prompts),
        greedy=arguments.greedy,
    )
    return [
        {
            "prompt": prompt,
            "completion": outcome.info["completion"],
            "finish_reason": outcome.info["finish_reason"],
        }
        for prompt, outcome in zip(arguments.prompts, outcomes, strict=True)
    ]


def _nothing(batch: RewardBatch) -> np.ndarray:
    return np.zeros(len(batch), np.float32)
