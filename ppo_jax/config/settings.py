"""Every setting of a run.

One frozen dataclass a concern; each field is a flag of `python -m ppo_jax.train` under its own
name, and its comment is the flag's help.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ppo_jax.algorithm import Aggregation, KlEstimator
from ppo_jax.config.checks import check_config
from ppo_jax.config.ranges import (
    Count,
    Decay,
    Factor,
    Limit,
    LimitAboveOne,
    Natural,
    Probability,
    Rate,
    Seed,
    Share,
    Temperature,
)
from ppo_jax.sampling import Sampling
from qwen_env import pocket
from qwen_env.prompts import Overflow

Schedule = Literal["constant", "linear", "cosine"]
ComputeType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TaskConfig:
    """What is trained on what."""

    model: str = str(pocket.POLICY_FOLDER)
    """Model to train: a folder in Hugging Face layout, a hub id, or a .gguf file."""
    prompts: str = str(pocket.TRAIN_PROMPTS)
    """Training prompts: a .jsonl file whose objects hold "prompt" (text) or "messages" (a chat)."""
    eval_prompts: str | None = str(pocket.HELDOUT_PROMPTS)
    """Held-out prompts (.jsonl); None sets the last tenth of the training prompts aside."""
    reward: str = f"flax:{pocket.REWARD_FOLDER}"
    """Reward: "package.module:callable", "hf:MODEL", "flax:FOLDER" (a Qwen2 reward model, run on
    the device), "http://..." (a reward server), or a weighted sum: "1.0 * a.b:c + 0.5 * d.e:f"."""
    gold_reward: str | None = None
    """A second reward that is reported and never trained on."""
    max_prompt_length: Count = pocket.MAX_PROMPT_LENGTH
    """P, the prompt limit, in tokens."""
    max_new_tokens: Count = pocket.MAX_NEW_TOKENS
    """T, the response limit, in tokens."""
    min_new_tokens: Natural = 0
    """No end-of-sequence token before this many tokens."""
    prompt_overflow: Overflow = "error"
    """What to do with a prompt over the limit."""
    chat: bool = False
    """Wrap each prompt in the tokenizer's chat template, as a user's message."""
    system_prompt: str | None = None
    """System message of every chat that has none of its own."""
    missing_eos_penalty: Factor = 0.0
    """Taken off the score of a response that the limit cut off."""


@dataclass(frozen=True)
class PPOConfig:
    """The algorithm."""

    batch_size: Count = 64
    """B, episodes per iteration."""
    completions_per_prompt: Count = 1
    """Episodes that start from one prompt; an iteration has batch_size / this many prompts."""
    temperature: Temperature = 1.0
    """Of sampling, and so of every log-probability."""
    top_k: Count | None = None
    """Sample from the k most probable tokens alone; log-probabilities are over the same ones."""
    top_p: Probability | None = None
    """Sample from the fewest most probable tokens that have this probability together."""

    kl_coef: Factor = 0.05
    """β: weight of the per-token KL penalty against the reference model; at first, if it adapts."""
    kl_penalty: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty in the reward."""
    kl_target: Limit | None = None
    """Adapt kl_coef towards this KL from the reference, in nats per response; None keeps it."""
    kl_horizon: Count = 10_000
    """Episodes, at least batch_size, over which an adaptive kl_coef changes by about a fifth."""
    ref_ema_decay: Decay | None = None
    """Let the reference follow the policy: after each iteration it keeps this share of itself."""
    scale_scores: bool = False
    """Divide scores by the standard deviation of all scores so far."""
    score_clip: Limit | None = None
    """Clip scores, scaled ones if they are scaled, to ± this."""
    whiten_rewards: bool = False
    """Scale the rewards of a batch's tokens to variance 1; their mean stays."""
    length_limit: Literal["score", "bootstrap"] = "score"
    """What a response that the limit cuts off earns: its score, or the value of its last state."""
    gamma: Share = 1.0
    """γ, the discount per token."""
    gae_lambda: Share = 0.95
    """λ of generalized advantage estimation."""
    advantage_whitening: Literal["batch", "minibatch", "none"] = "batch"
    """Scale the advantages of the whole batch, or of each minibatch, to mean 0, variance 1."""

    num_epochs: Count = 4
    """Passes over the batch per iteration, unless the KL early stop ends them."""
    num_minibatches: Count = 1
    """Optimizer steps per pass."""
    num_microbatches: Count = 1
    """Parts a minibatch is computed in, to save memory; the result does not depend on it."""
    num_packed_sizes: Count = 1
    """Sizes that a micro-batch may shrink to when short sequences share rows: with 4, one that fits
    into half its rows costs half. With more than 1, generation as well goes on in fewer rows once
    most have ended. More sizes follow the lengths more closely, and compile longer."""
    loss_aggregation: Aggregation = "token"
    """What counts alike in the mean loss of a minibatch: every token, or every sequence."""
    clip_range: Limit = 0.2
    """ε: the ratio is clipped to 1 ± ε."""
    clip_range_high: Limit | None = None
    """ε above 1, where it differs from that below; None makes it clip_range."""
    dual_clip: LimitAboveOne | None = None
    """Bound of the ratio's weight where the advantage is negative; None does not bound it."""
    value_clip_range: Limit | None = None
    """Clip of the value's change, in units of value; None does not clip."""
    value_coef: Factor = 0.1
    """Weight of the value loss."""
    entropy_coef: Factor = 0.0
    """Weight of the entropy bonus."""
    critic: Literal["shared", "stopped", "separate"] = "shared"
    """The value head's backbone: the policy's, the same without a gradient into it, or its own."""
    target_kl: Limit | None = None
    """End the updates of an iteration once KL(old ‖ new) exceeds this many nats per token."""
    target_kl_estimator: KlEstimator = "k3"
    """Estimator of that KL."""
    target_kl_grain: Literal["minibatch", "epoch"] = "minibatch"
    """Stop before the minibatch that exceeds target_kl, or after the epoch whose mean does."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def prompts_per_batch(self) -> int:
        """Different prompts per iteration."""
        return self.batch_size // self.completions_per_prompt


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    critic_learning_rate: Rate | None = None
    """That of the value head, and of its backbone if separate; None makes it learning_rate."""
    schedule: Schedule = "linear"
    """The learning rate over the run: it stays, or falls to zero in a line or along a cosine."""
    warmup_iterations: Natural = 0
    """Iterations over which the learning rate rises from zero, from when the policy learns."""
    adam_b1: Decay = 0.9
    """Decay of the first moment."""
    adam_b2: Decay = 0.999
    """Decay of the second moment."""
    adam_eps: Rate = 1e-5
    """Added to the root of the second moment."""
    weight_decay: Factor = 0.0
    """Decoupled weight decay of the matrices; norms and biases have none."""
    max_grad_norm: Limit = 1.0
    """Global norm that gradients are clipped to."""
    critic_warmup_iterations: Natural = 0
    """First iterations, in which only the value function learns, at the peak learning rate; its
    schedule begins after them."""
    freeze_embeddings: bool = False
    """Do not train the token embeddings (nor the output projection, where the two are tied)."""
    num_frozen_layers: Natural = 0
    """Do not train this many of the lowest layers."""
    max_nonfinite_updates: Count = 5
    """Non-finite losses or gradients in a row (each is skipped) that stop the run."""


@dataclass(frozen=True)
class RunConfig:
    """How long, how often, with what precision, on what."""

    num_iterations: Count | None = None
    """Iterations in all; None makes num_prompt_epochs passes over the prompts."""
    num_prompt_epochs: Count = 3
    """Passes over the training prompts, where num_iterations is None."""
    seed: Seed = 0
    """Root of every random choice."""
    dtype: ComputeType = "float32"
    """Compute type."""
    param_dtype: ComputeType = "float32"
    """Type of parameters and their first moments; bfloat16 halves their memory and rounds small
    steps away."""
    num_devices: Count = 1
    """Devices, such as GPUs, that each batch is split over; each has a copy of all parameters."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them: slower, smaller."""
    eval_every: Count = 10
    """Iterations between evaluations on the held-out prompts."""
    eval_size: Count = 64
    """Held-out prompts per evaluation."""
    save_every: Count = 25
    """Iterations between checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints that are kept."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    task: TaskConfig = field(default_factory=TaskConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Raises:
        UsageError: a field is out of its range, or two contradict each other.
        """
        check_config(self)


def as_json(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What `config.json` of a run folder holds."""
    return dataclasses.asdict(config)


def from_json(content: dict[str, dict[str, Any]]) -> TrainConfig:
    """The inverse of `as_json`."""
    return TrainConfig(
        task=TaskConfig(**content["task"]),
        ppo=PPOConfig(**content["ppo"]),
        optimizer=OptimizerConfig(**content["optimizer"]),
        run=RunConfig(**content["run"]),
    )
