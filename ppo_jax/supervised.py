"""What `ppo-sft` and `ppo-reward-model` share: flags, examples and the run itself."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ppo_jax import cli, flags
from ppo_jax.config import AdamWConfig
from ppo_jax.config.fields import Checked
from ppo_jax.config.supervised import (
    ExamplesConfig,
    LearningConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
)
from ppo_jax.examples import Example, ExampleEncoder, Kind, Pair, load_examples, set_apart
from ppo_jax.models.loading import read_max_length, refuse_adapter
from ppo_jax.runs.config_file import read_config
from ppo_jax.runs.folder import open_folder
from ppo_jax.runs.run import Run, Trainer
from ppo_jax.runs.trained import model_in
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
    resume: bool = False
    """Continue the run in output-dir with the settings it was started with; a larger num-iterations
    extends a finished run."""


def parse(
    argv: Sequence[str], kind: type[Config], arguments: type[Arguments], folder: str, prog: str
) -> tuple[Path, bool, Config]:
    """The run's folder, whether it is resumed, and its settings: flags over the defaults or, with
    --resume, over the interrupted run's settings.

    Args:
        folder: the default one.

    Raises:
        UsageError: an unknown flag or value, or settings that contradict each other.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--output-dir", "--output_dir", type=Path, nargs="?")
    first.add_argument("--resume", nargs="?", const=True)
    known, _ = first.parse_known_args(argv)
    path = (known.output_dir or Path(folder)).expanduser()
    base = read_config(path, kind) if known.resume else kind()
    default = arguments(path, base.data, base.learning, base.optimizer, base.run)
    given: Any = flags.parse(default, argv, prog=prog)
    data = replace(given.data, model=model_in(given.data.model))
    output_dir = given.output_dir.expanduser()
    return output_dir, given.resume, kind(data, given.learning, given.optimizer, given.run)


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


def train(
    config: SFTConfig | RewardModelConfig,
    output_dir: Path,
    make_trainer: Callable[[], Trainer],
    *,
    resume: bool,
    argv: Sequence[str] = (),
) -> None:
    """Run or resume a run in `output_dir`; see `ppo_jax.train.train`."""
    if config.optimizer.lora_rank is not None:
        refuse_adapter(config.data.model)
    with open_folder(output_dir.absolute(), config, resume=resume, argv=argv) as folder:
        Run(make_trainer(), folder).go(resume=resume)
