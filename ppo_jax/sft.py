"""Fine-tune a language model on answers: `ppo-sft --model M --data F.jsonl --output-dir D`."""

if __name__ == "__main__":  # before the imports below
    from ppo_jax import launch

    launch.sft()
    raise SystemExit

from pathlib import Path

from ppo_jax import supervised
from ppo_jax.config import SFTConfig
from ppo_jax.mesh import make_mesh
from ppo_jax.models import load_pretrained
from ppo_jax.models.loading import tokenizer_place
from ppo_jax.runs.supervised import SFTTrainer
from qwen_env.tokenizer import load_tokenizer


def make_trainer(config: SFTConfig) -> SFTTrainer:
    """A trainer of the model, and on the answers, that the settings name.

    Raises:
        UserFacingError: one of them cannot be read, or they do not go together.
    """
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


_command = supervised.Command(
    SFTConfig,
    "Fine-tune a language model on answers, with the loss on what the assistant says alone.",
    Path("runs", "sft"),
    make_trainer,
)
main, parse_arguments, train = _command.main, _command.parse_arguments, _command.train
