"""Time TRL's PPO on the work of `benchmarks/ppo.py`, for a comparison on one machine.

TRL needs other versions than this project, so it lives in an environment of its own; the model
folder is what `python -m ppo_jax.train` leaves (`best/`, `final/`), or any Qwen2 from the hub:

    python -m venv .venv-trl && .venv-trl/bin/pip install torch trl==1.10.0
    .venv-trl/bin/python benchmarks/peers/trl_ppo.py --model runs/smollm2/final

TRL's PPO keeps a value model of the policy's size beside the policy and the reference; the reward
model here is tiny, so that it costs next to nothing.
"""

import argparse
import json
import resource
import tempfile
import time
from importlib.metadata import version
from statistics import median

START = time.perf_counter()

import numpy as np  # noqa: E402  (the clock starts before the imports)
import torch  # noqa: E402
import trl.experimental.ppo.ppo_trainer as ppo_trainer  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=24)
    parser.add_argument("--response-length", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=3, help="after the first")
    work = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(work.model) for _ in range(2))
    value_model = AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=1)
    small = AutoConfig.from_pretrained(
        work.model,
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        num_labels=1,
        layer_types=["full_attention"],
    )
    reward_model = AutoModelForSequenceClassification.from_config(small)
    for model in (policy, reference, value_model, reward_model):
        model.config.pad_token_id = tokenizer.pad_token_id

    iterations = work.iterations + 1
    ids = np.random.default_rng(0).integers(
        100, 40_000, (iterations * work.batch_size, work.prompt_length)
    )
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=work.epochs,
        local_rollout_forward_batch_size=work.batch_size,
        response_length=work.response_length,
        total_episodes=iterations * work.batch_size,
        num_sample_generations=0,
        temperature=1.0,
        learning_rate=1e-6,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    # Each iteration begins with one call of `batch_generation`.
    began: list[float] = []
    generation: list[float] = []
    generate = ppo_trainer.batch_generation

    def timed_generation(*arguments, **options):
        began.append(time.perf_counter())
        result = generate(*arguments, **options)
        generation.append(time.perf_counter() - began[-1])
        return result

    ppo_trainer.batch_generation = timed_generation
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
    )
    trainer.train()
    began.append(time.perf_counter())
    seconds = np.diff(began)
    print(
        json.dumps(
            {
                "work": vars(work),
                "versions": {name: version(name) for name in ("trl", "torch", "transformers")},
                "seconds": {
                    "rollout": median(generation[1:]),
                    "iteration": median(seconds[1:].tolist()),
                },
                "start_to_end_of_first_iteration_s": began[1] - START,
                "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
