"""Time steps of supervised fine-tuning and of reward-model training, beside the machine's limits.

    python benchmarks/supervised.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/peers/trl_supervised.py --model FOLDER

Texts are random tokens of one length, so nothing is padded, and all but the first token is learnt;
for the reward model, each two are a pair. The floor is the arithmetic of forward and backward over
the speed of a large matrix product measured in this process. The second command times TRL's
SFTTrainer and RewardTrainer on the same work; it wants a folder in Hugging Face layout.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from flax import nnx
from ppo import SHAPES, matmul_speed, numbered_tokenizer

from ppo_jax import flags
from ppo_jax.config import RewardModelConfig, SFTConfig
from ppo_jax.config.supervised import LearningConfig, PreferenceLossConfig, SupervisedConfig
from ppo_jax.examples import Example, Pair
from ppo_jax.models import (
    DecoderConfig,
    PolicyValueNetwork,
    as_reward_model,
    load_pretrained,
    save_pretrained,
)
from ppo_jax.runs.supervised import RewardModelTrainer, SFTTrainer


@dataclass(frozen=True)
class Work:
    """What is timed."""

    model: str = "random:tiny"
    """A folder in Hugging Face layout, a .gguf file, or one of the SHAPES of benchmarks/ppo.py."""
    batch_size: int = 32
    """Texts a step; of the reward model half as many pairs."""
    length: int = 128
    """Of each text, in tokens."""
    steps: int = 3
    """Steps that are timed, after one that compiles."""
    save_to: Path | None = None
    """Write the model to this folder as well, for benchmarks/peers/trl_supervised.py."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command: one line of JSON."""
    argv = sys.argv[1:] if argv is None else argv
    work = flags.parse(Work(), argv, prog="python benchmarks/supervised.py")
    if work.model in SHAPES:
        network = PolicyValueNetwork(SHAPES[work.model], rngs=nnx.Rngs(0))
    else:
        network = load_pretrained(work.model)
    if work.save_to is not None:
        save_pretrained(network, work.save_to)
    tokenizer: Any = numbered_tokenizer(network.config.vocab_size)
    texts = random_texts(work, network.config.vocab_size)
    speed, report = matmul_speed("float32"), {}
    for name in ("sft", "reward_model"):
        if name == "sft":
            settings = SupervisedConfig(
                work.batch_size, num_iterations=work.steps + 1, num_packed_sizes=1
            )
            config: Any = SFTConfig(learning=settings, run=LearningConfig(eval_size=1))
            trainer: Any = SFTTrainer(config, network, tokenizer, texts, texts[:1])
        else:
            pairs = [Pair(*two, 0.0) for two in zip(texts[::2], texts[1::2], strict=True)]
            loss = PreferenceLossConfig(
                work.batch_size // 2, num_iterations=work.steps + 1, num_packed_sizes=1
            )
            config = RewardModelConfig(learning=loss, run=LearningConfig(eval_size=1))
            model = as_reward_model(network, 0)
            trainer = RewardModelTrainer(config, model, tokenizer, pairs, pairs[:1])
        seconds = [records["metrics"]["time/iteration_s"] for records in trainer.learn()]
        floor = floor_seconds(network.config, work, speed, has_logits=name == "sft")
        report[name] = {
            "seconds": median(seconds[1:]),
            "floor_seconds": floor,
            "times_its_floor": median(seconds[1:]) / floor,
            "tokens_per_s": work.batch_size * work.length / median(seconds[1:]),
        }
        del trainer
    print(json.dumps({"matmul_gflops": speed / 1e9, **report}))


def random_texts(work: Work, vocab_size: int) -> list[Example]:
    """As many as all steps and the first one, which compiles, take together."""
    count = (work.steps + 1) * work.batch_size
    rng = np.random.default_rng(0)
    ids = rng.integers(1, vocab_size // 2, (count, work.length)).astype(np.int32)
    return [Example("", "", row, np.ones(work.length, bool)) for row in ids]


def floor_seconds(config: DecoderConfig, work: Work, flops: float, *, has_logits: bool) -> float:
    """Forward and twice as much backward: matrix products, causal attention, logits."""
    d, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    body = 2 * d * config.head_dim * heads + 3 * d * config.intermediate_size  # a layer
    mixing = config.num_attention_heads * config.head_dim
    tokens = work.batch_size * work.length
    pairs = work.batch_size * work.length**2 / 2
    forward = config.num_hidden_layers * (2 * body * tokens + 4 * mixing * pairs)
    if has_logits:
        forward += 2 * config.vocab_size * d * work.batch_size * (work.length - 1)
    return 3 * forward / flops


if __name__ == "__main__":
    main()
