"""Train a reward model: `ppo-reward-model --model M --data F.jsonl --output-dir D`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.reward_model()
    raise SystemExit

from functools import partial
from pathlib import Path

import numpy as np

from ppo_jax import supervised
from ppo_jax.config import RewardModelConfig
from ppo_jax.mesh import make_mesh
from ppo_jax.models import as_reward_model, load_pretrained
from ppo_jax.models.loading import tokenizer_place
from ppo_jax.runs.supervised import RewardModelTrainer
from qwen_env.tokenizer import load_tokenizer


def make_trainer(config: RewardModelConfig) -> RewardModelTrainer:
    """A trainer of a reward model, from the language model and on the pairs that the settings name.

    Raises:
        UserFacingError: one of them cannot be read, or they do not go together.
    """
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


_command = supervised.Command(
    RewardModelConfig,
    "Train a reward model on pairs of answers, of which people chose one.",
    Path("runs", "reward_model"),
    make_trainer,
)
main, parse_arguments, train = _command.main, _command.parse_arguments, _command.train
