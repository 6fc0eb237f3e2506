"""Train a Qwen2 with PPO: `python -m ppo_jax.train --preset pocket --output-dir runs/pocket`."""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ppo_jax import cli
from ppo_jax.agent import PPOAgent
from ppo_jax.config import (
    PRESETS,
    OptimizerConfig,
    PPOConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    preset,
)
from ppo_jax.config.checks import check_warmups
from ppo_jax.generation.reward_models import load_training_reward
from ppo_jax.models import load_pretrained
from ppo_jax.runs.folder import RunFolder, read_config
from ppo_jax.runs.run import PROG, Run
from qwen_env.errors import UsageError
from qwen_env.prompts import PromptDataset, PromptEncoder, load_prompts
from qwen_env.task import make_task
from qwen_env.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Arguments:
    """Train a Qwen2 with PPO. A preset gives every flag its default."""

    output_dir: Path
    """Folder of the run; runs/PRESET where it is not given."""
    task: TaskConfig
    ppo: PPOConfig
    optimizer: OptimizerConfig
    run: RunConfig
    preset: str = "pocket"
    """Where the defaults come from: pocket, smollm2, or qwen2.5-0.5b."""
    resume: bool = False
    """Continue the run that output-dir holds, with the settings it was started with; a preset then
    names no more than the folder."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        arguments, config = parse_arguments(sys.argv[1:] if argv is None else argv)
        cli.keep_compiled_programs()
        cli.find_devices()
        train(config, arguments.output_dir, resume=arguments.resume)


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
    arguments = cli.parse(Arguments, argv, prog=PROG, default=default)
    arguments = replace(arguments, output_dir=arguments.output_dir.expanduser())
    return arguments, TrainConfig(arguments.task, arguments.ppo, arguments.optimizer, arguments.run)


def train(config: TrainConfig, output_dir: Path, *, resume: bool = False) -> None:
    """Run or resume a training run in `output_dir`; see `ppo_jax.runs.folder` for what it leaves.

    Raises:
        UsageError: a setting, a file or the reward function is wrong. What was learnt is saved.
        SystemExit: a signal ended the run early; what was learnt is saved.
    """
    folder = RunFolder(output_dir, config, resume=resume)
    cli.refuse_run_folder(config.task.model)
    if config.task.model == PRESETS["smollm2"].task.model and not Path(config.task.model).exists():
        raise UsageError(f"{config.task.model}: no such file; make train-smollm2 downloads it.")
    tokenizer = load_tokenizer(config.task.model)
    prompts, eval_prompts = load_all_prompts(config, tokenizer)
    iterations = num_iterations(config, len(prompts))
    settings = config.task
    reward = load_training_reward(settings.reward, tokenizer, settings.gold_reward)
    network = load_pretrained(
        settings.model, dtype=config.run.dtype, param_dtype=config.run.param_dtype
    )
    task = make_task(
        tokenizer=tokenizer,
        prompts=prompts,
        reward=reward,
        max_prompt_length=settings.max_prompt_length,
        max_new_tokens=settings.max_new_tokens,
        vocab_size=network.config.vocab_size,
        min_new_tokens=settings.min_new_tokens,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    agent = PPOAgent(network, task, config, iterations)
    run = Run(agent, folder, eval_prompts[: config.run.eval_size])
    with folder.locked():
        try:
            with closing(folder):
                run.go(resume=resume)
        except BaseException:
            if not resume and folder.is_blank():
                folder.discard()
            raise


def load_all_prompts(
    config: TrainConfig, tokenizer: Tokenizer
) -> tuple[PromptDataset, PromptDataset]:
    """The training prompts and the held-out ones."""
    settings = config.task
    encoder = PromptEncoder(
        tokenizer,
        settings.max_prompt_length,
        overflow=settings.prompt_overflow,
        chat_template=True if settings.chat else None,
        system_prompt=settings.system_prompt,
    )

    def load(path: str) -> PromptDataset:
        loaded = load_prompts(path, encoder)
        cli.say_dropped(loaded, path, settings.max_prompt_length)
        return loaded

    prompts = load(settings.prompts)
    if settings.eval_prompts is not None:
        return prompts, load(settings.eval_prompts)
    if len(prompts) < 2:
        raise UsageError(
            f"{settings.prompts} holds one prompt, so none can be set aside for evaluation; "
            "add prompts, or name others with --eval-prompts."
        )
    num_held_out = max(len(prompts) // 10, 1)
    return prompts[:-num_held_out], prompts[-num_held_out:]


def num_iterations(config: TrainConfig, num_prompts: int) -> int:
    """Iterations of the whole run; the last pass over the prompts may end within a batch.

    Raises:
        UsageError: a warm-up would last as long.
    """
    if config.run.num_iterations is not None:
        return config.run.num_iterations
    num_visits = config.run.num_prompt_epochs * num_prompts
    iterations = math.ceil(num_visits / config.ppo.prompts_per_batch)
    check_warmups(config.optimizer, iterations)
    return iterations


if __name__ == "__main__":
    main()
