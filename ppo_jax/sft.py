"""Fine-tune a language model on answers: `ppo-sft --model M --data F.jsonl --output-dir D`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.sft()
    raise SystemExit

import sys
from collections.abc import Sequence
from pathlib import Path

from ppo_jax import cli, supervised
from ppo_jax.config import SFTConfig
from ppo_jax.mesh import make_mesh
from ppo_jax.models import load_pretrained
from ppo_jax.models.loading import tokenizer_place
from ppo_jax.runs.supervised import SFTTrainer
from qwen_env.tokenizer import load_tokenizer


class Arguments(supervised.Arguments):
    """Fine-tune a language model on answers, with the loss on what the assistant says alone."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        argv = sys.argv[1:] if argv is None else argv
        output_dir, resume, config = parse_arguments(argv)
        cli.keep_compiled_programs()
        cli.find_devices()
        train(config, output_dir, resume=resume, argv=argv)


def parse_arguments(argv: Sequence[str]) -> tuple[Path, bool, SFTConfig]:
    """The run's folder, whether it is resumed, and its settings; see `supervised.parse`."""
    return supervised.parse(argv, SFTConfig, Arguments, "runs/sft", SFTTrainer.prog)


def train(
    config: SFTConfig, output_dir: Path, *, resume: bool = False, argv: Sequence[str] = ()
) -> None:
    """Run or resume supervised fine-tuning in `output_dir`; see `ppo_jax.train.train`."""

    def make_trainer() -> SFTTrainer:
        data, run = config.data, config.run
        tokenizer = load_tokenizer(tokenizer_place(data.model))
        training, held_out = supervised.load_data(data, tokenizer, lambda encoder: encoder.example)
        network = load_pretrained(
            data.model,
            dtype=run.dtype,
            param_dtype=run.param_dtype,
            mesh=make_mesh(run.num_devices, run.num_shards),
        )
        return SFTTrainer(config, network, tokenizer, training, held_out)

    supervised.train(config, output_dir, make_trainer, resume=resume, argv=argv)
