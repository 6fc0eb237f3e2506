"""The models that a run has left, and the settings that it was started with."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from ppo_jax.agent import PPOAgent
from ppo_jax.config import DevicesConfig, TrainConfig
from ppo_jax.models import PolicyValueNetwork
from ppo_jax.models.loading import RUN_MODELS, is_run
from ppo_jax.runs.checkpoints import Checkpoints
from ppo_jax.runs.config_file import is_of, read_config
from qwen_env.errors import UsageError
from qwen_env.task import TextTask


class TrainedRun(NamedTuple):
    """A run's settings, and one of its models: "final", "best", or a checkpoint's iteration."""

    folder: Path
    config: TrainConfig
    which: str

    @property
    def model(self) -> str:
        """The model to load: the run's, or for a checkpoint the one that training began with."""
        return str(self.folder / self.which) if self.which in RUN_MODELS else self.config.task.model

    def trained(
        self, network: PolicyValueNetwork, task: TextTask, devices: DevicesConfig
    ) -> PolicyValueNetwork:
        """`network`, loaded from `model`, with the parameters of the checkpoint if it is one's.

        Takes the memory of a training state on the way.

        Raises:
            UserFacingError: the checkpoint is damaged, or of another version.
        """
        if self.which in RUN_MODELS:
            return network
        run = replace(self.config.run, **asdict(devices))
        # Nothing is learnt, so a horizon that fits the whole run need not fit one iteration.
        ppo = replace(self.config.ppo, kl_target=None, kl_horizon=None)
        config = replace(self.config, ppo=ppo, run=run)
        agent = PPOAgent(network, task, config, num_iterations=1)
        checkpoints = Checkpoints(self.folder / "checkpoints", self.config.run.keep_checkpoints)
        restored = checkpoints.restore(agent.state, only=int(self.which))
        assert restored is not None
        agent.state = restored[0]
        return agent.network


def named_run(argv: Sequence[str]) -> TrainedRun | None:
    """The run that `--run`, or `--model`, names, and the model that `--which` chooses.

    Raises:
        UsageError: the folder holds no run, or not that model; or there are both flags.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--run", "--model", "--which"):
        first.add_argument(flag, nargs="?")
    known, _ = first.parse_known_args(argv)
    if known.run is not None and known.model is not None:
        raise UsageError(
            f"run ({known.run}) and model ({known.model}) both name what to load; leave one out."
        )
    if known.run is not None:
        return _open(Path(known.run).expanduser(), known.which)
    if known.model is not None and is_run(folder := Path(known.model).expanduser()):
        return _open(folder, known.which) if _is_of_ppo(folder) else None
    if known.which is not None:
        raise UsageError(
            f"which is {known.which!r}, but no run is named to choose from; add --run."
        )
    return None


def _is_of_ppo(folder: Path) -> bool:
    """Whether the run in `folder` was PPO's, which has settings of how the model answers."""
    return is_of(folder, TrainConfig)


def _open(folder: Path, which: str | None) -> TrainedRun:
    if not is_run(folder):
        raise UsageError(
            f"{folder} holds no run; name a folder that ppo-train has written (its --output-dir)."
        )
    if not _is_of_ppo(folder):
        raise UsageError(f"The run in {folder} is not PPO's; name it as --model.")
    config = read_config(folder)
    iterations = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints).iterations()
    models = [name for name in RUN_MODELS if (folder / name).is_dir()]
    there = [*models, *map(str, iterations[::-1])]
    if not there:
        raise UsageError(
            f"The run in {folder} has saved no model yet; let it go on, or continue it with "
            f"ppo-train --output-dir {folder} --resume."
        )
    name = there[0] if which is None else which
    if name not in there:
        raise UsageError(f"which is {name!r}, but the run in {folder} has {', '.join(there)}.")
    return TrainedRun(folder, config, name)
