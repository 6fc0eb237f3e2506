"""Training prompts that the untrained model answers right now and then: `--keep-solvable`.

PPO learns from differences: a prompt that is answered right always, or never, has nothing to teach.
How often each is answered right is measured once, before training, and kept in the run folder as

    solvable.json   samples, seed   answers drawn for each prompt, and the run's seed
                    rates           the share of them that was right, by the prompt's number
"""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ppo_jax.config import TrainConfig
from ppo_jax.files import atomic, write_json
from ppo_jax.generation.actor import Actor
from ppo_jax.generation.episode_metrics import ACCURACY
from ppo_jax.hosts import on_first
from ppo_jax.mesh import make_mesh, place, replicate
from ppo_jax.models import PolicyValueNetwork
from ppo_jax.runs.progress import counting
from qwen_env.episodes import Episode
from qwen_env.errors import UsageError
from qwen_env.files import read_json
from qwen_env.prompts import PromptDataset
from qwen_env.rewards.base import reward_name
from qwen_env.task import TextTask

Rates = dict[int, float]
"""The share of right answers, by the prompt's number in its source."""

MIN_SAMPLES = 8  # answers to each prompt; more where training draws more
_NO_ITERATION = 2**32 - 1  # its random numbers are those of no iteration


def measure(network: PolicyValueNetwork, task: TextTask, config: TrainConfig, path: Path) -> None:
    """Let the untrained model answer each training prompt several times, and write `path`.

    As many answers are generated at a time as in training, if that is enough for one prompt.

    Raises:
        UserFacingError: the reward reports no accuracy, or fails, or `path` cannot be written.
    """
    on_first(lambda: _check_reports_accuracy(task))
    samples = max(config.ppo.completions_per_prompt, MIN_SAMPLES)
    mesh = make_mesh(config.run.num_devices, config.run.num_shards)
    actor = Actor(
        network,
        task,
        config.ppo.sampling,
        compacts_rows=config.ppo.num_packed_sizes > 1,
        num_slots=config.run.rollout_slots,
        mesh=mesh,
    )
    key = jax.random.fold_in(jax.random.key(config.run.seed), _NO_ITERATION)
    with counting("answering the training prompts", len(task.prompts)) as count:
        _, outcomes = actor.respond_to_all(
            place(nnx.state(network), mesh),
            task.prompts,
            jax.random.wrap_key_data(replicate(np.asarray(jax.random.key_data(key)), mesh)),
            batch_size=max(config.ppo.batch_size // samples, 1),
            completions_per_prompt=samples,
            on_batch=count,
        )
    right = [outcome.info["reward_components"].get(ACCURACY, 0.0) for outcome in outcomes]
    shares = np.reshape(right, (-1, samples)).mean(axis=1).tolist()
    rates = {prompt.index: share for prompt, share in zip(task.prompts, shares, strict=True)}

    def write() -> None:
        with atomic(path) as partial:
            write_json(partial, {"samples": samples, "seed": config.run.seed, "rates": rates})

    on_first(write)


def read_rates(path: Path, prompts: PromptDataset) -> Rates:
    """What `measure` has written of these prompts.

    Raises:
        UsageError: the file is gone or damaged, or is of other prompts.
    """
    content = read_json(path)
    if not content:
        raise UsageError(
            f"{path} is gone, which says what prompts the run is trained on; put it back, or start "
            "another run in another --output-dir."
        )
    found = content.get("rates")
    rates: Rates = {}
    for prompt in prompts:
        rate = found.get(str(prompt.index)) if isinstance(found, dict) else None
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise UsageError(
                f"{path} has no rate of prompt {prompt.index}; put the prompts and that file back "
                "as they were, or start another run in another --output-dir."
            )
        rates[prompt.index] = float(rate)
    return rates


def kept(prompts: PromptDataset, rates: Rates, config: TrainConfig) -> tuple[PromptDataset, str]:
    """The prompts whose rate is within `keep_solvable`, and a sentence that says how many.

    Raises:
        UsageError: they are fewer than one batch takes.
    """
    assert config.task.keep_solvable is not None
    low, high = config.task.keep_solvable
    chosen = [prompt for prompt in prompts if low <= rates[prompt.index] <= high]
    below = sum(rates[prompt.index] < low for prompt in prompts)
    others = f"{below} are below, {len(prompts) - len(chosen) - below} above"
    if len(chosen) < (needed := config.ppo.prompts_per_batch):
        raise UsageError(
            f"keep_solvable is {low:g} {high:g}, but of {len(prompts)} prompts the untrained model "
            f"answers {len(chosen)} that often right ({others}), and a batch has {needed}; widen "
            "keep_solvable, lower batch_size, or add prompts."
        )
    said = (
        f"Kept {len(chosen)} of {len(prompts)} prompts: those that the untrained model answers "
        f"right in {100 * low:g} to {100 * high:g} % of its tries ({others})."
    )
    return PromptDataset(chosen, prompts.num_dropped), said


def _check_reports_accuracy(task: TextTask) -> None:
    """Ask the reward about an empty answer, before anything takes long."""
    nothing = Episode(task.prompts[0], np.zeros(0, np.int32), "eos")
    [outcome] = task.evaluate([nothing])
    components = outcome.info["reward_components"]
    if ACCURACY not in components:
        raise UsageError(
            f"keep_solvable needs to know which answers are right, but {reward_name(task.reward)} "
            f"reports no component {ACCURACY!r} (only {', '.join(components)}); let it return "
            "(scores, {'accuracy': array of 0 and 1}), or leave keep_solvable out."
        )
