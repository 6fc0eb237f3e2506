"""Time TRL's SFTTrainer and RewardTrainer on the work of `benchmarks/supervised.py`.

    pip install trl==1.16.0
    python benchmarks/peers/trl_supervised.py --model FOLDER

The folder is one that `--save-to` of that program has written, or any model in Hugging Face layout.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import tokenizers
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """When steps begin and end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.began = 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began[0])
        self.processor_seconds.append(time.process_time() - self.began[1])


def main() -> None:
    """The command: one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before these")
    parser.add_argument("--trainers", nargs="+", default=["sft", "reward_model"])
    work = parser.parse_args()
    policy = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    vocab_size = policy.config.vocab_size
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0")
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="0")
    steps = work.warm_up + work.steps
    count = steps * work.batch_size
    ids = np.random.default_rng(0).integers(1, vocab_size // 2, (count, work.length)).tolist()
    common: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": 1e-6,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "max_length": work.length,
    }
    seconds: dict[str, float] = {}
    busy: dict[str, float] = {}

    def timed(name: str, trainer_class: Any, **arguments: Any) -> None:
        if name not in work.trainers:
            return
        clock = Clock()
        trainer_class(processing_class=tokenizer, callbacks=[clock], **arguments).train()
        seconds[name] = median(clock.seconds[work.warm_up :])
        busy[name] = median(clock.processor_seconds[work.warm_up :])

    with tempfile.TemporaryDirectory() as folder:
        timed(
            "sft",
            SFTTrainer,
            model=policy,
            args=SFTConfig(folder, per_device_train_batch_size=work.batch_size, **common),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
        )
        del policy
        pairs = {"chosen_ids": ids[::2], "rejected_ids": ids[1::2]}
        model = AutoModelForSequenceClassification.from_pretrained(
            work.model, num_labels=1, dtype=torch.float32
        )
        model.config.pad_token_id = 0
        timed(
            "reward_model",
            RewardTrainer,
            model=model,
            args=RewardConfig(folder, per_device_train_batch_size=work.batch_size // 2, **common),
            train_dataset=Dataset.from_dict(pairs),
        )
    versions = {name: version(name) for name in ("trl", "torch", "transformers")}
    times = {"seconds": seconds, "processor_seconds": busy}
    print(json.dumps({"work": vars(work), "versions": versions, **times}))


if __name__ == "__main__":
    main()
