"""What is learnt over several turns, by name: the game, the trap, and the tool."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from learning.jobs import Job
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TrainConfig
from qwen_env.errors import UsageError

LOW, HIGH, TURNS = 1, 9, 4
GAME = f"guess_the_number?low={LOW}&high={HIGH}&turns={TURNS}"


def optimum() -> float:
    """Mean turns of bisection, the fewest with which every number is guessed: 1 number at the first
    guess, up to 2 at the second, up to 4 at the third, ..."""
    count = HIGH - LOW + 1
    numbers = [int(np.log2(i)) + 1 for i in range(1, count + 1)]
    return float(np.mean(numbers))


@dataclass(frozen=True)
class Setting:
    """What a run plays, and how it is paid: 1 for the number, or for the right answer, and what
    else `task` and these fields say. `against` names what it is compared with."""

    name: str
    task: str = GAME
    cost: float = 0.0  # of a wrong guess
    missing_eos_penalty: float = 0.0
    ppo: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-3
    warmup_iterations: int = 0
    against: str | None = None
    length: float = 1.0  # of the iterations

    def num_iterations(self, iterations: int) -> int:
        """Where one of length 1 has so many."""
        return max(round(self.length * iterations), 1)

    @property
    def changes(self) -> str:
        """All that is not in the name."""
        fields = vars(self).items()
        return ", ".join(f"{k} {v}" for k, v in fields if k not in ("name", "against"))


END, EACH_TURN, CALCULATOR = "paid at the end", "paid each turn", "calculator"
TRAP, MILD = "wrong guess -0.5", "wrong guess -0.25"
PAID, BOOTSTRAP = "and cut off -1", "and bootstrap"
# Adam's first steps are as long as its rate, whatever the gradient. Where one may end in a trap, or
# forget what was seldom shown, they must be short.
_CAREFUL: dict[str, Any] = {"warmup_iterations": 8, "length": 0.5}
_TRAP = {"cost": 0.5, **_CAREFUL}
SETTINGS = (
    Setting(END),
    Setting(EACH_TURN, f"{GAME}&rewards=turns", against=END),
    Setting(TRAP, **_TRAP),
    Setting(MILD, cost=0.25, against=TRAP, **_CAREFUL),
    Setting(PAID, missing_eos_penalty=1.0, against=TRAP, **_TRAP),
    Setting(BOOTSTRAP, ppo={"length_limit": "bootstrap"}, against=TRAP, **_TRAP),
    Setting(
        CALCULATOR, "calculator?digits=1", learning_rate=1e-3, warmup_iterations=8, length=0.25
    ),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


def config(setting: Setting, seed: int) -> TrainConfig:
    """How a run learns."""
    ppo = PPOConfig(
        batch_size=256,
        kl_coef=0.0,
        gamma=0.95,
        entropy_coef=0.02,
        num_epochs=2,
        num_minibatches=2,
    )
    return TrainConfig(
        ppo=replace(ppo, **setting.ppo),
        optimizer=OptimizerConfig(
            learning_rate=setting.learning_rate, warmup_iterations=setting.warmup_iterations
        ),
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
        [Job(s.name, seed, s.num_iterations(iterations), s.changes) for seed in range(num_seeds)]
        for s in SETTINGS
        if s.name in names or not names
    ]
