"""Train a language model with PPO: `ppo-train --preset pocket --output-dir runs/pocket`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.train()
    raise SystemExit

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ppo_jax import cli, flags, hosts
from ppo_jax.agent import PPOAgent
from ppo_jax.assembly import assemble, with_critic_model
from ppo_jax.config import (
    OptimizerConfig,
    PPOConfig,
    ProcessesConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    preset,
)
from ppo_jax.config.fields import Checked
from ppo_jax.mesh import make_mesh
from ppo_jax.models.loading import model_in, refuse_adapter
from ppo_jax.runs.config_file import facts, read_config
from ppo_jax.runs.folder import open_folder
from ppo_jax.runs.ppo import PPOTrainer, prompts_digest
from ppo_jax.runs.publishing import check_can_push, push
from ppo_jax.runs.run import Run
from ppo_jax.runs.solvable import kept, measure, read_rates


@dataclass(frozen=True)
class Arguments(Checked):
    """Train a language model with PPO. A preset gives every flag its default."""

    output_dir: Path
    """Folder of the run; by default runs/PRESET."""
    task: TaskConfig
    ppo: PPOConfig
    optimizer: OptimizerConfig
    run: RunConfig
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    preset: str = "pocket"
    """Preset that the defaults come from: pocket, sao, smollm2, arithmetic, gsm8k, or
    qwen2.5-0.5b."""
    resume: bool = False
    """Continue the run in output-dir with the settings it was started with, whatever the preset;
    a larger num-iterations extends a finished run."""
    push_to_hub: str | None = None
    """USER/NAME of a repository on the Hugging Face hub that gets the best model, or else the final
    one, when the run is done."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        argv = sys.argv[1:] if argv is None else argv
        arguments, config = parse_arguments(argv)
        with cli.started(arguments.processes):
            repository, run = arguments.push_to_hub, arguments.output_dir
            if repository is not None:
                hosts.on_first(partial(check_can_push, repository))
            train(config, run, resume=arguments.resume, argv=argv)
            if repository is not None:
                cli.say(f"The model is at {hosts.on_first(partial(push, run, repository))}.")


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, TrainConfig]:
    """Flags over the preset's defaults or, with --resume, over the interrupted run's settings.

    Raises:
        UsageError: an unknown preset, flag or value, or settings that contradict each other.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--output-dir", "--output_dir", type=Path, nargs="?")
    first.add_argument("--resume", nargs="?", const=True)
    known, _ = first.parse_known_args(argv)
    name = known.preset or "pocket"
    base = preset(name)
    folder = known.output_dir or Path("runs", name)
    if known.resume:
        base = read_config(folder.expanduser())
    default = Arguments(folder, base.task, base.ppo, base.optimizer, base.run, preset=name)
    arguments = flags.parse(default, argv, prog=TrainConfig.command)
    arguments = replace(
        arguments,
        output_dir=arguments.output_dir.expanduser(),
        task=replace(arguments.task, model=model_in(arguments.task.model)),
    )
    if (critic := arguments.ppo.critic_model) is not None:
        arguments = replace(arguments, ppo=replace(arguments.ppo, critic_model=model_in(critic)))
    return arguments, TrainConfig(arguments.task, arguments.ppo, arguments.optimizer, arguments.run)


def train(
    config: TrainConfig, output_dir: Path, *, resume: bool = False, argv: Sequence[str] = ()
) -> None:
    """Run or resume a training run in `output_dir`; see `ppo_jax.runs.folder` for what it leaves.

    `argv` are the command line's words, if it came from one; see `RunFolder`.

    Raises:
        UserFacingError: a setting, a file or the reward function is wrong, or the run cannot go
            on. What was learnt is saved.
        SystemExit: a signal ended the run early; what was learnt is saved.
    """
    # Absolute, since a reward may change the working directory.
    output_dir = output_dir.absolute()
    hosts.check_alike(lambda: facts(config) | {"output_dir": str(output_dir)})
    run = config.run
    if config.optimizer.lora_rank is not None:
        refuse_adapter(config.task.model)
    with open_folder(output_dir, config, resume=resume, argv=argv) as folder:
        mesh = make_mesh(run.num_devices, run.num_shards)
        network, task, held_out = assemble(
            config.task,
            dtype=run.dtype,
            param_dtype=run.param_dtype,
            mesh=mesh,
            say=cli.say,
        )
        network = with_critic_model(network, config, task.tokenizer, mesh)
        assert held_out is not None  # the prompts are those of the settings
        hosts.check_alike(
            lambda: {
                "prompts": prompts_digest(task.prompts),
                "held-out prompts": prompts_digest(held_out),
            }
        )
        if config.task.keep_solvable is not None:
            if not resume:
                measure(network, task, config, folder.solvable)
            rates = read_rates(folder.solvable, task.prompts)
            prompts, said = kept(task.prompts, rates, config)
            cli.say(said)
            task = replace(task, prompts=prompts)
        agent = PPOAgent(network, task, config)
        del network  # where some of its layers are frozen, the agent has copies of all of them
        Run(PPOTrainer(agent, held_out), folder).go(resume=resume)
