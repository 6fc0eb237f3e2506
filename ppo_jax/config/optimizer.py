"""AdamW, its schedule, and what it leaves as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ppo_jax.config.fields import Checked, Count, Decay, Factor, Limit, Natural, Rate
from qwen_env.errors import UsageError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class AdamWConfig(Checked):
    """AdamW and its schedule."""

    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """How the learning rate falls over the run: not at all, to zero linearly, or to zero along a
    cosine."""
    warmup_iterations: Natural = 0
    """Iterations over which the learning rate rises from zero, counted from when the policy
    learns."""
    adam_b1: Decay = 0.9
    """Decay of Adam's first moment."""
    adam_b2: Decay = 0.999
    """Decay of Adam's second moment."""
    adam_eps: Rate = 1e-5
    """Adam's ε, added to the root of the second moment."""
    weight_decay: Factor = 0.0
    """Decoupled weight decay of the matrices; norms and biases have none."""
    max_grad_norm: Limit = 1.0
    """Clip gradients to this global norm."""
    freeze_embeddings: bool = False
    """Do not train the token embeddings (nor the output projection, where the two are tied)."""
    num_frozen_layers: Natural = 0
    """Do not train this many of the lowest layers."""
    lora_rank: Count | None = None
    """Train low-rank adapters (LoRA) of this rank and the value head, and nothing else; None trains
    the model itself."""
    lora_alpha: Rate | None = None
    """Scale the adapters by this over lora_rank; None makes it twice lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get adapters, such as q_proj v_proj; none named means all of them."""
    max_nonfinite_updates: Count = 5
    """Stop the run after this many losses or gradients in a row that were not finite; each is
    skipped."""

    _warmups: ClassVar[Sequence[str]] = ("warmup_iterations",)  # one after the other

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_alpha", "lora_targets"):
            if self.lora_rank is None and (value := getattr(self, name)):
                raise UsageError(
                    f"{name} is {value!r}, but there are no adapters; set lora_rank, or leave "
                    f"{name} out."
                )

    def check_warmups(self, num_iterations: int) -> None:
        """Refuse warm-ups that would last for a whole run.

        Raises:
            UsageError: names the warm-up.
        """
        warmups = {name: getattr(self, name) for name in self._warmups if getattr(self, name)}
        if sum(warmups.values()) >= num_iterations:
            raise UsageError(
                f"{' + '.join(warmups)} ({' + '.join(map(str, warmups.values()))}) must be below "
                f"num_iterations ({num_iterations}); otherwise the learning rate would never fall."
            )


@dataclass(frozen=True)
class OptimizerConfig(AdamWConfig):
    """AdamW and its schedule, for a policy and its critic."""

    critic_learning_rate: Rate | None = None
    """Peak learning rate of the value head, and of its backbone if separate; None makes it
    learning_rate."""
    critic_warmup_iterations: Natural = 0
    """First iterations in which only the value function learns, at the peak learning rate; the
    schedule begins after them."""
    critic_warmup_patience: Count | None = None
    """End the critic's warm-up earlier, once its explained variance has not risen for this many
    iterations in a row; None lets it last as long as critic_warmup_iterations says."""

    _warmups: ClassVar[Sequence[str]] = ("critic_warmup_iterations", "warmup_iterations")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_warmup_patience is not None and not self.critic_warmup_iterations:
            raise UsageError(
                f"critic_warmup_patience is {self.critic_warmup_patience}, but "
                "critic_warmup_iterations is 0, so there is no warm-up to end; set it to the most "
                "iterations that it may last, or leave critic_warmup_patience out."
            )

    def check_warmups(self, num_iterations: int) -> None:
        """Likewise, of the critic's warm-up too."""
        if self.critic_warmup_iterations >= num_iterations:
            raise UsageError(
                f"critic_warmup_iterations ({self.critic_warmup_iterations}) must be below "
                f"num_iterations ({num_iterations}); otherwise the policy would never learn."
            )
        super().check_warmups(num_iterations)
