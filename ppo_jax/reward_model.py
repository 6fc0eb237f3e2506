"""Train a reward model: `ppo-reward-model --model M --data F.jsonl --output-dir D`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.reward_model()
    raise SystemExit

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ppo_jax import cli, supervised
from ppo_jax.config import RewardModelConfig
from ppo_jax.mesh import make_mesh
from ppo_jax.models import as_reward_model, load_pretrained
from ppo_jax.models.loading import tokenizer_place
from ppo_jax.runs.supervised import RewardModelTrainer
from qwen_env.tokenizer import load_tokenizer


class Arguments(supervised.Arguments):
    """Train a reward model on pairs of answers, of which people chose one."""


def main(argv: Sequence[str] | None = None) -> None:
    with cli.errors_as_sentences():
        argv = sys.argv[1:] if argv is None else argv
        output_dir, resume, config = parse_arguments(argv)
        cli.keep_compiled_programs()
        cli.find_devices()
        train(config, output_dir, resume=resume, argv=argv)


def parse_arguments(argv: Sequence[str]) -> tuple[Path, bool, RewardModelConfig]:
    """The run's folder, whether it is resumed, and its settings; see `supervised.parse`."""
    return supervised.parse(
        argv, RewardModelConfig, Arguments, "runs/reward_model", RewardModelTrainer.prog
    )


def train(
    config: RewardModelConfig, output_dir: Path, *, resume: bool = False, argv: Sequence[str] = ()
) -> None:
    """Run or resume reward-model training in `output_dir`; see `ppo_jax.train.train`."""

    def make_trainer() -> RewardModelTrainer:
        data, run = config.data, config.run
        tokenizer = load_tokenizer(tokenizer_place(data.model))
        rng = np.random.default_rng(run.seed)
        training, held_out = supervised.load_data(
            data,
            tokenizer,
            lambda encoder: partial(encoder.pair, ends=lambda: rng.random() < data.eos_share),
        )
        policy = load_pretrained(
            data.model,
            dtype=run.dtype,
            param_dtype=run.param_dtype,
            mesh=make_mesh(run.num_devices, run.num_shards),
        )
        network = as_reward_model(policy, run.seed)
        return RewardModelTrainer(config, network, tokenizer, training, held_out)

    supervised.train(config, output_dir, make_trainer, resume=resume, argv=argv)
