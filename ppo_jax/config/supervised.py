"""Settings of supervised learning: fine-tuning on answers, and reward models from preferences."""

from dataclasses import dataclass, field
from typing import ClassVar

from ppo_jax.config.fields import Checked, Count, Factor, Share
from ppo_jax.config.optimizer import AdamWConfig
from ppo_jax.config.presets import DATA
from ppo_jax.config.session import SessionConfig
from ppo_jax.config.task import ModelConfig
from qwen_env.errors import UsageError


@dataclass(frozen=True)
class ExamplesConfig(ModelConfig):
    """Which model learns, and what from."""

    data: str = ""
    """What to learn from, a .jsonl file."""
    eval_data: str | None = None
    """What to hold out (.jsonl); None sets the last tenth of the data aside."""
    max_length: Count | None = None
    """Longest text, in tokens; None makes it that of the longest one there is."""


@dataclass(frozen=True)
class CompletionsConfig(ExamplesConfig):
    """Which model learns, and what from."""

    data: str = str(DATA / "pocket_completions.jsonl")
    """Answers to learn: a .jsonl file whose objects hold "prompt" and "completion", or "messages"
    (a chat, whose assistant's turns are learnt). A text beyond max_length loses its end."""


@dataclass(frozen=True)
class PreferencesConfig(ExamplesConfig):
    """Which model learns, and what from."""

    data: str = str(DATA / "pocket_preferences.jsonl")
    """Preferences to learn: a .jsonl file whose objects hold "prompt", "chosen" and "rejected", all
    three text or parts of a chat, and perhaps a "margin". A text beyond max_length loses its
    beginning."""
    eos_share: Share = 1.0
    """The share of plain texts that an end-of-sequence token follows; the others end as a response
    that the length limit cut off."""


@dataclass(frozen=True)
class SupervisedConfig(Checked):
    """How it is learnt."""

    batch_size: Count = 32
    """Texts per iteration, or pairs of texts: an iteration is one optimizer step."""
    num_epochs: Count = 2
    """Passes over the data, where num_iterations is None."""
    num_iterations: Count | None = None
    """Iterations in all; None makes num_epochs passes over the data."""
    num_microbatches: Count = 1
    """Compute each batch in this many parts, to save memory; the result does not change."""
    num_packed_sizes: Count = 4
    """Let short texts share rows, in programs compiled for this many sizes: with 4, a batch that
    fits into half its rows costs half. 1 pads all texts to the longest."""


@dataclass(frozen=True)
class PreferenceLossConfig(SupervisedConfig):
    """How it is learnt."""

    num_epochs: Count = 3
    """Passes over the data, where num_iterations is None."""
    centring_coef: Factor = 0.01
    """Weight of (r⁺ + r⁻)² in the loss, which keeps the mean score near 0: pairs say nothing of
    it."""
    center: bool = False
    """Save the model with its scores of the held-out texts at mean 0 and standard deviation 1, as
    PPO's other settings expect of a reward."""


@dataclass(frozen=True)
class LearningConfig(SessionConfig):
    """How often, with what precision, on what."""

    eval_size: Count = 256
    """Held-out texts, or pairs, per evaluation."""


@dataclass(frozen=True)
class SupervisedRunConfig:
    """A whole run of supervised learning.

    Raises:
        UsageError: two settings contradict each other; it names both and the way out.
    """

    command: ClassVar[str]

    data: ExamplesConfig
    learning: SupervisedConfig
    optimizer: AdamWConfig
    run: LearningConfig

    def __post_init__(self) -> None:
        learning, num_devices = self.learning, self.run.num_devices
        if learning.batch_size % (learning.num_microbatches * num_devices):
            raise UsageError(
                f"batch_size ({learning.batch_size}) must be a multiple of num_microbatches x "
                f"num_devices ({learning.num_microbatches} x {num_devices})."
            )


@dataclass(frozen=True)
class SFTConfig(SupervisedRunConfig):
    """A whole run of supervised fine-tuning."""

    command: ClassVar[str] = "ppo-sft"

    data: CompletionsConfig = field(default_factory=CompletionsConfig)
    learning: SupervisedConfig = field(default_factory=SupervisedConfig)
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(learning_rate=5e-4))
    run: LearningConfig = field(default_factory=LearningConfig)


@dataclass(frozen=True)
class RewardModelConfig(SupervisedRunConfig):
    """A whole run of reward-model training."""

    command: ClassVar[str] = "ppo-reward-model"

    data: PreferencesConfig = field(default_factory=PreferencesConfig)
    learning: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(learning_rate=1e-3))
    run: LearningConfig = field(default_factory=LearningConfig)


def total_iterations(learning: SupervisedConfig, optimizer: AdamWConfig, num_examples: int) -> int:
    """Iterations of a whole run on so many examples; the last pass may end within a batch.

    Raises:
        UsageError: the warm-up would last as long.
    """
    iterations = learning.num_iterations
    if iterations is None:
        iterations = -(-learning.num_epochs * num_examples // learning.batch_size)
    optimizer.check_warmups(iterations)
    return iterations
