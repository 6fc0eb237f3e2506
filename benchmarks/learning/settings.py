"""What is compared: the pocket preset, and the preset with one knob turned."""

from dataclasses import dataclass, field, replace
from typing import Any

from ppo_jax.config import TrainConfig, preset

BASELINE = "baseline"
LONG = "twice as long"
"""The baseline with twice the iterations of the others; the learning curves are its."""

FRONTIER = "best policies"
"""What can be earned at each KL; drawn once, since it does not depend on any training."""
BEST_OF_N = "best of n"
SFT = {"SFT on best of 8": 8, "SFT on best of 32": 32}
"""The baselines without PPO; for SFT, the n of each."""


@dataclass(frozen=True)
class Setting:
    """The pocket preset with some fields changed.

    `length` multiplies the iterations, over which the learning rate falls. `against` names the
    setting that differs from this one by one knob. `eval_every` iterations, and at the end, the
    policy is measured; None is at the end alone.
    """

    name: str
    group: str
    ppo: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    length: int = 1
    against: str = BASELINE
    eval_every: int | None = None

    def config(self, iterations: int, seed: int) -> TrainConfig:
        base = preset("pocket")
        num_iterations = self.length * iterations
        return TrainConfig(
            task=base.task,
            ppo=replace(base.ppo, **self.ppo),
            optimizer=replace(base.optimizer, **self.optimizer),
            run=replace(base.run, num_iterations=num_iterations, seed=seed),
        )

    @property
    def changes(self) -> str:
        """The fields that differ from the preset, as flags."""
        fields = {**self.ppo, **self.optimizer}
        if self.length != 1:
            fields["num_iterations"] = f"x{self.length}"
        return ", ".join(f"{name} {value}" for name, value in fields.items())


FOUR_MINIBATCHES = {"num_minibatches": 4}
FOUR_ANSWERS = {"completions_per_prompt": 4}
PROPORTIONAL = {
    "ppo": {"num_epochs": 2, "gae_lambda": 1.0, "critic": "stopped", "advantage_whitening": "none"},
    "optimizer": {
        "adam_eps": 1e-2,
        "learning_rate": 2e-2,
        "critic_learning_rate": 1.5e-2,
        "max_grad_norm": 0.3,
    },
}
"""Steps in proportion to gradients, which vanish at the optimum: docs/learning.md, "Closer"."""

SETTINGS = (
    Setting(BASELINE, "preset"),
    Setting(LONG, "preset", length=2, eval_every=5),
    # KL from the reference
    Setting("no KL penalty", "KL", {"kl_coef": 0.0}),
    Setting("KL penalty x 4", "KL", {"kl_coef": 0.2}),
    Setting("adaptive KL, 2 nats", "KL", {"kl_target": 2.0, "kl_horizon": 500}),
    Setting("KL penalty k3", "KL", {"kl_penalty": "k3"}),
    Setting("EMA reference", "KL", {"ref_ema_decay": 0.95}),
    # rewards and advantages
    Setting("no whitening", "advantage", {"advantage_whitening": "none"}),
    Setting("reward whitening", "advantage", {"whiten_rewards": True}),
    Setting("score scaling", "advantage", {"scale_scores": True}),
    Setting("λ 1", "advantage", {"gae_lambda": 1.0}),
    Setting("λ 0.8", "advantage", {"gae_lambda": 0.8}),
    Setting("γ 0.99", "advantage", {"gamma": 0.99}),
    Setting("bootstrap at the limit", "advantage", {"length_limit": "bootstrap"}),
    Setting(
        "group advantages",
        "advantage",
        FOUR_ANSWERS | {"advantage": "group"},
        against="4 completions a prompt",
    ),
    Setting(
        "leave-one-out advantages",
        "advantage",
        FOUR_ANSWERS | {"advantage": "leave_one_out"},
        against="4 completions a prompt",
    ),
    Setting("REINFORCE++", "advantage", {"advantage": "reinforce_plus_plus"}),
    # towards the best policy of a KL coefficient
    Setting("β 0.19", "optimum", {"kl_coef": 0.19}, length=2, against=LONG),
    *(
        Setting(
            f"β {kl_coef}, proportional steps",
            "optimum",
            PROPORTIONAL["ppo"] | {"kl_coef": kl_coef},
            PROPORTIONAL["optimizer"],
            length=2,
            against="β 0.19",
        )
        for kl_coef in (0.486, 0.19, 0.05)
    ),
    # the policy's loss
    Setting("clip 0.1", "policy loss", {"clip_range": 0.1}),
    Setting("clip 0.4", "policy loss", {"clip_range": 0.4}),
    Setting("clip 0.2 / 0.28", "policy loss", {"clip_range_high": 0.28}),
    Setting("dual clip 3", "policy loss", {"dual_clip": 3.0}),
    Setting("sequence mean", "policy loss", {"loss_aggregation": "sequence"}),
    Setting("entropy bonus 0.01", "policy loss", {"entropy_coef": 0.01}),
    # the value function
    Setting("critic stopped", "critic", {"critic": "stopped"}),
    Setting("critic separate", "critic", {"critic": "separate"}),
    Setting("critic's learning rate x 10", "critic", {}, {"critic_learning_rate": 3e-3}),
    Setting("critic warm-up", "critic", {}, {"critic_warmup_iterations": 5}),
    Setting("value weight 1", "critic", {"value_coef": 1.0}),
    Setting(
        "value weight 1, twice as long",
        "critic",
        {"value_coef": 1.0},
        length=2,
        against=LONG,
    ),
    Setting("no value function", "critic", {"value_coef": 0.0}),
    Setting("value clip 0.2", "critic", {"value_clip_range": 0.2}),
    # how much is learnt from a batch
    Setting("1 epoch", "updates", {"num_epochs": 1}),
    Setting("8 epochs", "updates", {"num_epochs": 8}),
    Setting("4 minibatches", "updates", FOUR_MINIBATCHES),
    Setting(
        "4, each whitened",
        "updates",
        FOUR_MINIBATCHES | {"advantage_whitening": "minibatch"},
        against="4 minibatches",
    ),
    Setting("KL stop, minibatch", "updates", {"target_kl": 0.01}),
    Setting("KL stop, epoch", "updates", {"target_kl": 0.01, "target_kl_grain": "epoch"}),
    Setting("learning rate / 3", "updates", {}, {"learning_rate": 1e-4}),
    Setting("learning rate x 3", "updates", {}, {"learning_rate": 9e-4}),
    Setting("frozen embeddings", "updates", {}, {"freeze_embeddings": True}),
    # how responses are drawn
    Setting("4 completions a prompt", "sampling", FOUR_ANSWERS),
    Setting("top-p 0.9", "sampling", {"top_p": 0.9}),
)
