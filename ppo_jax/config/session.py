"""How long a run is, how often it does what, with what precision and on what."""

from dataclasses import dataclass
from typing import Literal

from ppo_jax.config.fields import Checked, Count, Natural, Seed
from qwen_env.errors import UsageError

ComputeType = Literal["float32", "bfloat16"]
TrackerName = Literal["trackio", "wandb", "mlflow"]


@dataclass(frozen=True)
class MeshConfig(Checked):
    """What a computation is split over."""

    num_devices: Count = 1
    """Split each batch over this many devices, such as GPUs."""
    num_shards: Count = 1
    """Cut each copy of the parameters, and of moments and reference, over this many of the
    devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_devices % self.num_shards:
            raise UsageError(
                f"num_shards ({self.num_shards}) does not divide num_devices ({self.num_devices}); "
                "choose a number that does."
            )


@dataclass(frozen=True)
class ProcessesConfig(Checked):
    """Which processes there are, if there are several."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the processes of a run meet that has several; None takes what
    SLURM, Open MPI or a Cloud TPU says, if they start several."""
    num_processes: Count | None = None
    """Processes of the run, each with devices of its own."""
    process_id: Natural | None = None
    """Number of this process, from 0."""


@dataclass(frozen=True)
class DevicesConfig(MeshConfig):
    """What a computation is split over, and how much of it is done at a time."""

    rollout_slots: Count | None = None
    """Write so many responses at a time on each device, which bounds the memory of generation: as
    responses end, the next prompts take their places. None writes a whole batch at once. Either
    way, the tokens are the same."""

    def check_slots(self, batch_size: int) -> None:
        """Refuse more slots than a device has responses of a batch.

        Raises:
            UsageError: names both.
        """
        if self.rollout_slots is not None and self.rollout_slots * self.num_devices > batch_size:
            devices = f" on each of {self.num_devices} devices" if self.num_devices > 1 else ""
            raise UsageError(
                f"rollout_slots is {self.rollout_slots}{devices}, but a batch has only "
                f"{batch_size} response{'s' if batch_size > 1 else ''}; lower it, or leave it out."
            )


@dataclass(frozen=True)
class SessionConfig(MeshConfig):
    """How often, with what precision, on what."""

    seed: Seed = 0
    """Seed of every random choice."""
    dtype: ComputeType = "float32"
    """Type that activations and matrix products are computed in."""
    param_dtype: ComputeType = "float32"
    """Type that parameters and first moments are kept in; bfloat16 halves their memory and rounds
    small steps away."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them: slower, with less
    memory."""
    eval_every: Count = 10
    """Iterations between evaluations on what is held out."""
    save_every: Count = 25
    """Iterations between checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints to keep."""
    log_to: tuple[TrackerName, ...] = ()
    """Trackers to log to as well: trackio, wandb, mlflow. The run folder's own records and
    tensorboard/ are always written."""


@dataclass(frozen=True)
class RunConfig(SessionConfig, DevicesConfig):
    """How long, how often, with what precision, on what."""

    num_iterations: Count | None = None
    """Iterations in all; None makes num_prompt_epochs passes over the prompts."""
    num_prompt_epochs: Count = 3
    """Passes over the training prompts, where num_iterations is None."""
    eval_size: Count = 64
    """Held-out prompts per evaluation."""
    inspect_size: Natural = 8
    """Training episodes whose tokens, and all that PPO knows of each, are kept at the first
    iteration and at each evaluation for ppo-inspect, in tokens.jsonl: about 200 bytes a token of a
    response. 0 keeps none."""
