"""Presets: settings that go together, by name."""

from pathlib import Path

from ppo_jax.config.optimizer import OptimizerConfig
from ppo_jax.config.ppo import PPOConfig
from ppo_jax.config.session import RunConfig
from ppo_jax.config.settings import TrainConfig
from ppo_jax.config.task import TaskConfig
from qwen_env.errors import UsageError

DATA = Path(__file__).parents[1] / "data"

PRESETS: dict[str, TrainConfig] = {
    # The embedded task on a CPU, in a couple of minutes.
    "pocket": TrainConfig(
        task=TaskConfig(gold_reward="qwen_env.rewards.sentiment:pocket_sentiment"),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        run=RunConfig(num_iterations=60),
    ),
    # A real language model on two CPU cores: film reviews that end well.
    "smollm2": TrainConfig(
        task=TaskConfig(
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            prompts=str(DATA / "film_openings.jsonl"),
            eval_prompts=str(DATA / "film_openings_heldout.jsonl"),
            reward="qwen_env.rewards.sentiment:vader_compound",
            max_prompt_length=24,
            max_new_tokens=24,
        ),
        ppo=PPOConfig(batch_size=32, num_epochs=1, num_minibatches=4, kl_coef=0.02),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_iterations=3),
        run=RunConfig(num_iterations=40, eval_every=10, eval_size=32, save_every=20),
    ),
    # The real Qwen on two CPU cores, and questions that can be verified: docs/verifiable_task.md
    # says why each value is what it is.
    "arithmetic": TrainConfig(
        task=TaskConfig(
            model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            task="reasoning_gym:chain_sum?min_terms=3&max_terms=3&max_digits=1&size=1024"
            "&question={expression} =&instruction=&answer=last_number",
            system_prompt="Solve it in steps, one short line each.",
            chat=True,
            max_new_tokens=20,
        ),
        ppo=PPOConfig(
            batch_size=64,
            num_epochs=1,
            num_minibatches=2,
            num_packed_sizes=4,
            kl_coef=0.01,
            critic="stopped",
        ),
        optimizer=OptimizerConfig(
            learning_rate=6e-6,
            critic_learning_rate=1e-4,
            adam_eps=1e-4,
            warmup_iterations=2,
            freeze_embeddings=True,
            num_frozen_layers=12,
        ),
        run=RunConfig(num_iterations=12, eval_every=6, eval_size=256, save_every=6),
    ),
    # What verl publishes for PPO with this model on GSM8K (its quickstart; there 36 % of the test
    # questions right before and 57 % after). It is meant for a GPU.
    "gsm8k": TrainConfig(
        task=TaskConfig(
            model="Qwen/Qwen2.5-0.5B-Instruct",
            task="gsm8k",
            chat=True,
            max_prompt_length=512,
            prompt_overflow="drop",
            max_new_tokens=512,
        ),
        ppo=PPOConfig(
            batch_size=256,
            num_epochs=1,
            num_minibatches=4,
            num_microbatches=4,
            num_packed_sizes=4,
            kl_coef=0.001,
            gamma=1.0,
            gae_lambda=1.0,
            critic="separate",
            value_coef=0.5,
            value_clip_range=0.5,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            critic_learning_rate=1e-5,
            schedule="constant",
            adam_eps=1e-8,
            weight_decay=0.01,
        ),
        run=RunConfig(
            num_prompt_epochs=15, dtype="bfloat16", eval_every=5, eval_size=256, save_every=20
        ),
    ),
    # Single-rollout PPO as SAO describes it (arXiv:2607.07508, of GLM-5.2), on the embedded task:
    # one answer a prompt, one pass of the policy and two of a critic of its own, whose λ is 1 while
    # the policy's follows the length; ratios to what the rollout drew from, none of which counts
    # outside of 0.2 to 4; ten iterations of the critic alone at first. Its critic learns five times
    # as fast. What the paper has beside: rollouts that go on while it learns, and attention that is
    # frozen in the critic. `--critic-model qwen_env/pocket/reward` starts it warm.
    "sao": TrainConfig(
        task=TaskConfig(gold_reward="qwen_env.rewards.sentiment:pocket_sentiment"),
        ppo=PPOConfig(
            num_epochs=1,
            num_minibatches=4,
            critic="separate",
            critic_epochs=2,
            critic_gae_lambda=1.0,
            gae_lambda_alpha=1.0,  # answers of ten words; the papers' 0.05 is for thousands
            old_logprobs="rollout",
            clip_sides="both",
            clip_range=0.8,
            clip_range_high=3.0,
            value_coef=0.5,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, critic_learning_rate=1.5e-3, critic_warmup_iterations=10
        ),
        run=RunConfig(num_iterations=70),
    ),
    # The hyperparameters of the reference algorithm, kept as they are. On the real model and short
    # answers its steps are too long: docs/verifiable_task.md shows it. Its discount, 0.99 a token,
    # makes a score of 1 at the end of 256 tokens worth 0.08 at their beginning; long answers want
    # --gamma 1.
    "qwen2.5-0.5b": TrainConfig(
        task=TaskConfig(
            model="Qwen/Qwen2.5-0.5B",
            prompts=None,  # nothing fits every task: prompts and reward must be given
            eval_prompts=None,
            reward=None,
            max_prompt_length=256,
            max_new_tokens=256,
        ),
        ppo=PPOConfig(
            batch_size=4,
            gamma=0.99,
            gae_lambda=0.95,
            clip_range=0.2,
            value_coef=0.5,
            entropy_coef=0.01,
            num_epochs=4,
            num_packed_sizes=4,
            target_kl=0.01,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5, max_grad_norm=0.5),
        run=RunConfig(num_prompt_epochs=3),
    ),
}


def preset(name: str) -> TrainConfig:
    """The preset called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
