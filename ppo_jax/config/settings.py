"""Every setting of a run.

One frozen dataclass a concern, which refuses what its fields cannot be; `TrainConfig` refuses what
two concerns contradict each other in. Each field is a flag of `ppo-train` under its own name, and
the text below it is the flag's help.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints, overload

from ppo_jax.config.optimizer import AdamWConfig, OptimizerConfig
from ppo_jax.config.ppo import PPOConfig
from ppo_jax.config.session import RunConfig, SessionConfig
from ppo_jax.config.task import TaskConfig
from qwen_env.errors import UsageError


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Raises:
        UsageError: two settings contradict each other; it names both and the way out.
    """

    command: ClassVar[str] = "ppo-train"

    task: TaskConfig = field(default_factory=TaskConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        ppo, optimizer, run = self.ppo, self.optimizer, self.run
        parts = {"num_minibatches": ppo.num_minibatches, "num_microbatches": ppo.num_microbatches}
        for factors in (parts, {"completions_per_prompt": ppo.completions_per_prompt}):
            factors = factors | {"num_devices": run.num_devices}
            if ppo.batch_size % math.prod(factors.values()):
                named = {name: factor for name, factor in factors.items() if factor > 1}
                raise UsageError(
                    f"batch_size ({ppo.batch_size}) must be a multiple of {' x '.join(named)} "
                    f"({' x '.join(map(str, named.values()))})."
                )
        run.check_slots(ppo.batch_size)
        if ppo.length_limit == "bootstrap" and (penalty := self.task.missing_eos_penalty):
            raise UsageError(
                f"missing_eos_penalty ({penalty}) is subtracted from the score of a response that "
                "the limit cut off, but with length_limit 'bootstrap' that score is never paid; "
                "leave one of them out."
            )
        if ppo.value_coef == 0 or not ppo.has_value_function:
            cause = (
                "value_coef is 0" if ppo.has_value_function else f"advantage is {ppo.advantage!r}"
            )
            for name in ("critic_warmup_iterations", "critic_learning_rate"):
                if getattr(optimizer, name):
                    raise UsageError(
                        f"{name} is {getattr(optimizer, name)}, but {cause}, so no value function "
                        f"learns; change that, or leave {name} out."
                    )
        if run.num_iterations is not None:
            optimizer.check_warmups(run.num_iterations)
            ppo.for_run(run.num_iterations)

    def total_iterations(self, num_prompts: int) -> int:
        """Iterations of a whole run on so many prompts; the last pass may end within a batch.

        Raises:
            UsageError: a warm-up would last as long.
        """
        if self.run.num_iterations is not None:
            return self.run.num_iterations
        num_visits = self.run.num_prompt_epochs * num_prompts
        iterations = math.ceil(num_visits / self.ppo.prompts_per_batch)
        self.optimizer.check_warmups(iterations)
        return iterations


class RunSettings(Protocol):
    """The settings of a run of any kind: a frozen dataclass of groups."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    command: ClassVar[str]
    """What starts and resumes such a run."""

    @property
    def run(self) -> SessionConfig: ...

    @property
    def optimizer(self) -> AdamWConfig: ...


Config = TypeVar("Config", bound=RunSettings)


def as_json(config: RunSettings) -> dict[str, dict[str, Any]]:
    """What `config.json` of a run folder holds: the fields of each group of settings."""
    return dataclasses.asdict(config)


@overload
def from_json(content: Mapping[str, Any]) -> TrainConfig: ...
@overload
def from_json(content: Mapping[str, Any], kind: type[Config]) -> Config: ...
def from_json(content: Mapping[str, Any], kind: type[Any] = TrainConfig) -> Any:
    """The inverse of `as_json`, for a dataclass of groups of settings."""
    hints, groups = get_type_hints(kind), [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: hints[name](**content[name]) for name in groups})
