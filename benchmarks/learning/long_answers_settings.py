"""Advantages where answers are long and rewards rare, by name."""

from dataclasses import dataclass, field, replace
from typing import Any

from learning.jobs import Job
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TrainConfig
from qwen_env.errors import UsageError

LENGTH = 64  # symbols of an answer
ENOUGH = 42  # of them that must be good

PPO, SEPARATE, IMPROVED, GROUP = "PPO", "separate critic", "four critic epochs", "group"


@dataclass(frozen=True)
class Setting:
    """What a run changes; `against` names what it is compared with."""

    name: str
    ppo: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    against: str | None = PPO

    @property
    def changes(self) -> str:
        """All that is not in the name."""
        return f"{LENGTH} symbols, {ENOUGH} good, ppo {self.ppo}, optimizer {self.optimizer}"


_FAST: dict[str, Any] = {"critic_learning_rate": 1e-3}
_OWN: dict[str, Any] = {"critic": "separate", "critic_gae_lambda": 1.0}
_FOUR: dict[str, Any] = {**_OWN, "critic_epochs": 4}
_EIGHT: dict[str, Any] = {"completions_per_prompt": 8}
SETTINGS = (
    Setting(PPO, against=GROUP),
    Setting("lambda 1", {"gae_lambda": 1.0}),
    Setting(SEPARATE, {"critic": "separate"}, _FAST),
    Setting("critic's lambda 1", _OWN, _FAST, SEPARATE),
    Setting(IMPROVED, _FOUR, _FAST, "critic's lambda 1"),
    Setting("length-adaptive lambda", {**_FOUR, "gae_lambda_alpha": 1.0}, _FAST, IMPROVED),
    Setting("critic first", _FOUR, {**_FAST, "critic_warmup_iterations": 3}, IMPROVED),
    Setting(
        "HL-Gauss", {**_FOUR, "value_loss": "hl_gauss", "value_range": (0, 1)}, _FAST, IMPROVED
    ),
    Setting(GROUP, {"advantage": "group", **_EIGHT}, against=IMPROVED),
    Setting("leave one out", {"advantage": "leave_one_out", **_EIGHT}, against=GROUP),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


def config(setting: Setting, seed: int) -> TrainConfig:
    """How a run learns."""
    ppo = PPOConfig(batch_size=256, kl_coef=0.0, num_epochs=2, num_minibatches=4)
    optimizer = OptimizerConfig(learning_rate=1e-4, warmup_iterations=4)
    return TrainConfig(
        ppo=replace(ppo, **setting.ppo),
        optimizer=replace(optimizer, **setting.optimizer),
        run=RunConfig(seed=seed),
    )


def jobs(names: tuple[str, ...], num_seeds: int, iterations: int) -> list[list[Job]]:
    """One list a name (all of them, if none is given), with a job a seed.

    Raises:
        UsageError: there is no such name.
    """
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"There is no setting {name!r}; choose from: {', '.join(BY_NAME)}.")
    return [
        [Job(s.name, seed, iterations, s.changes) for seed in range(num_seeds)]
        for s in SETTINGS
        if s.name in names or not names
    ]
