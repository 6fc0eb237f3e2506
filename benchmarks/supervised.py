"""Time steps of supervised fine-tuning and of reward-model training, beside the machine's limits.

    python benchmarks/supervised.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/peers/trl_supervised.py --model FOLDER

Texts are random tokens of one length, so nothing is padded, and all but the first token is learnt;
for the reward model, each two are a pair. The floor is the arithmetic of forward and backward over
the speed of a large matrix product measured in this process. Both are counted in processor seconds,
too, which say more on a CPU that has other work. The second command times TRL's SFTTrainer and
RewardTrainer on the same work; it wants a folder in Hugging Face layout.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ppo import SHAPES, matmul_speed, numbered_tokenizer

from ppo_jax import cli, flags
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
    """Of what size, and what of it."""

    model: str = "random:tiny"
    """A folder in Hugging Face layout, a .gguf file, or one of the SHAPES of benchmarks/ppo.py."""
    batch_size: int = 32
    """Texts a step; of the reward model half as many pairs."""
    length: int = 128
    """Of each text, in tokens."""
    steps: int = 3
    """Steps that are timed."""
    warm_up: int = 1
    """Steps before these."""
    trainers: tuple[Literal["sft", "reward_model"], ...] = ("sft", "reward_model")
    """What is timed."""
    save_to: Path | None = None
    """Write the model to this folder as well, for benchmarks/peers/trl_supervised.py."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command: one line of JSON."""
    argv = sys.argv[1:] if argv is None else argv
    work = flags.parse(Work(), argv, prog="python benchmarks/supervised.py")
    cli.keep_compiled_programs()
    if work.model in SHAPES:
        network = PolicyValueNetwork(SHAPES[work.model], rngs=nnx.Rngs(0))
    else:
        network = load_pretrained(work.model)
    if work.save_to is not None:
        save_pretrained(network, work.save_to)
    tokenizer: Any = numbered_tokenizer(network.config.vocab_size)
    texts = random_texts(work, network.config.vocab_size)
    speed, report = matmul_speed("float32"), {}
    for name in work.trainers:
        if name == "sft":
            settings = SupervisedConfig(
                work.batch_size, num_iterations=work.warm_up + work.steps, num_packed_sizes=1
            )
            config: Any = SFTConfig(learning=settings, run=LearningConfig(eval_size=1))
            trainer: Any = SFTTrainer(config, network, tokenizer, texts, texts[:1])
        else:
            pairs = [Pair(*two, 0.0) for two in zip(texts[::2], texts[1::2], strict=True)]
            loss = PreferenceLossConfig(
                work.batch_size // 2, num_iterations=work.warm_up + work.steps, num_packed_sizes=1
            )
            config = RewardModelConfig(learning=loss, run=LearningConfig(eval_size=1))
            model = as_reward_model(network, 0)
            trainer = RewardModelTrainer(config, model, tokenizer, pairs, pairs[:1])
        batch = trainer._texts(trainer._items[: trainer.config.learning.batch_size])
        # The program is kept on disk, where the first step finds it.
        trainer._update.lower(trainer.state, batch, trainer._frozen).compile()
        seconds, busy, since = [], [], time.process_time()
        for records in trainer.learn():
            seconds.append(records["metrics"]["time/iteration_s"])
            busy.append(time.process_time() - since)
            since += busy[-1]
        median_seconds, median_busy = (median(x[work.warm_up :]) for x in (seconds, busy))
        operations = count_operations(network.config, work, has_logits=name == "sft")
        report[name] = {
            "seconds": median_seconds,
            "floor_seconds": operations / speed,
            "times_its_floor": median_seconds / (operations / speed),
            "processor_seconds": median_busy,
            "floor_processor_seconds": operations / matmul_per_processor_second(),
            "tokens_per_s": work.batch_size * work.length / median_seconds,
        }
        del trainer
    print(json.dumps({"matmul_gflops": speed / 1e9, **report}))


def random_texts(work: Work, vocab_size: int) -> list[Example]:
    """As many as all steps take together."""
    count = (work.warm_up + work.steps) * work.batch_size
    rng = np.random.default_rng(0)
    ids = rng.integers(1, vocab_size // 2, (count, work.length)).astype(np.int32)
    return [Example("", "", row, np.ones(work.length, bool)) for row in ids]


def count_operations(config: DecoderConfig, work: Work, *, has_logits: bool) -> float:
    """Floating-point operations of a step, forward and twice as many backward: matrix products,
    causal attention, logits."""
    d, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    body = 2 * d * config.head_dim * heads + 3 * d * config.intermediate_size  # a layer
    mixing = config.num_attention_heads * config.head_dim
    tokens = work.batch_size * work.length
    pairs = work.batch_size * work.length**2 / 2
    forward = config.num_hidden_layers * (2 * body * tokens + 4 * mixing * pairs)
    if has_logits:
        forward += 2 * config.vocab_size * d * work.batch_size * (work.length - 1)
    return 3 * forward


def matmul_per_processor_second(runs: int = 5) -> float:
    """Operations of a large matrix product in float32 in a second of one processor."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 2048)), jnp.float32)
    start = time.process_time()
    for _ in range(runs):
        (x @ x).block_until_ready()
    return runs * 2 * 2048**3 / (time.process_time() - start)


if __name__ == "__main__":
    main()
