"""What `ppo-sft` and `ppo-reward-model` share: flags, examples and the run itself."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from ppo_jax import cli, flags, hosts
from ppo_jax.config import (
    AdamWConfig,
    ExamplesConfig,
    LearningConfig,
    ProcessesConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
)
from ppo_jax.config.fields import Checked
from ppo_jax.examples import Example, ExampleEncoder, Kind, Pair, load_examples, set_apart
from ppo_jax.models.loading import model_in, read_max_length, refuse_adapter
from ppo_jax.runs.config_file import facts, read_config
from ppo_jax.runs.folder import open_folder
from ppo_jax.runs.run import Run, Trainer
from qwen_env.prompts import PromptEncoder
from qwen_env.tokenizer import Tokenizer

Config = TypeVar("Config", SFTConfig, RewardModelConfig)

_NO_LIMIT = 2**20  # tokens of a prompt; the limit is one of the whole text


@dataclass(frozen=True)
class Arguments(Checked):
    """Flags of both commands."""

    output_dir: Path
    """Folder of the run."""
    data: ExamplesConfig
    learning: SupervisedConfig
    optimizer: AdamWConfig
    run: LearningConfig
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    resume: bool = False
    """Continue the run in output-dir with the settings it was started with; a larger num-iterations
    extends a finished run."""


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A command that learns from texts."""

    config: type[Config]
    about: str
    """What it does."""
    output_dir: Path
    """The folder of a run that names none."""
    make_trainer: Callable[[Config], Trainer]
    """Reads what the settings name."""

    def main(self, argv: Sequence[str] | None = None) -> None:
        """The command."""
        with cli.errors_as_sentences():
            argv = sys.argv[1:] if argv is None else argv
            arguments, config = self.parse_arguments(argv)
            with cli.started(arguments.processes):
                self.train(config, arguments.output_dir, resume=arguments.resume, argv=argv)

    def parse_arguments(self, argv: Sequence[str]) -> tuple[Arguments, Config]:
        """Flags over the defaults or, with --resume, over the interrupted run's settings.

        Raises:
            UsageError: an unknown flag or value, or settings that contradict each other.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--output-dir", "--output_dir", type=Path, nargs="?")
        first.add_argument("--resume", nargs="?", const=True)
        known, _ = first.parse_known_args(argv)
        path = (known.output_dir or self.output_dir).expanduser()
        base = read_config(path, self.config) if known.resume else self.config()
        default = Arguments(path, base.data, base.learning, base.optimizer, base.run)
        given = flags.parse(default, argv, prog=self.config.command, about=self.about)
        data = replace(given.data, model=model_in(given.data.model))
        given = replace(given, output_dir=given.output_dir.expanduser(), data=data)
        groups: Any = data, given.learning, given.optimizer, given.run
        return given, self.config(*groups)

    def train(
        self, config: Config, output_dir: Path, *, resume: bool = False, argv: Sequence[str] = ()
    ) -> None:
        """Run or resume a run in `output_dir`; see `ppo_jax.train.train`."""
        output_dir = output_dir.absolute()
        hosts.check_alike(lambda: facts(config) | {"output_dir": str(output_dir)})
        if config.optimizer.lora_rank is not None:
            refuse_adapter(config.data.model)
        with open_folder(output_dir, config, resume=resume, argv=argv) as folder:
            trainer = self.make_trainer(config)
            sources = trainer.training, trainer.held_out
            hosts.check_alike(lambda: {source.what: source.digest for source in sources})
            Run(trainer, folder).go(resume=resume)


def load_data(
    settings: ExamplesConfig,
    tokenizer: Tokenizer,
    encode_with: Callable[[ExampleEncoder], Callable[[Any, str], Kind]],
) -> tuple[list[Kind], list[Kind]]:
    """What is learnt from, and what is held out; says how many texts were cut.

    Raises:
        UsageError: a row of a file is wrong.
    """
    encoder = ExampleEncoder(
        PromptEncoder(
            tokenizer,
            _NO_LIMIT,
            chat_template=True if settings.chat else None,
            system_prompt=settings.system_prompt,
            chat_template_kwargs=settings.template_arguments,
        ),
        settings.max_length or read_max_length(settings.model),
    )

    def read(source: str) -> list[Kind]:
        items = load_examples(source, encode_with(encoder))
        if cut := sum(_is_cut(item) for item in items):
            cli.say(
                f"Cut {cut} of {len(items)} rows of {source} off: more than "
                f"{encoder.max_length} tokens."
            )
        return items

    training = read(settings.data)
    if settings.eval_data is not None:
        return training, read(settings.eval_data)
    return set_apart(training, settings.data)


def _is_cut(item: Example | Pair) -> bool:
    return any(x.is_cut for x in (item[:2] if isinstance(item, Pair) else (item,)))
