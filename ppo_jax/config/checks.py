"""Which settings are refused, before anything is loaded or compiled."""

import math
from typing import TYPE_CHECKING, Any

from ppo_jax.config.ranges import check_ranges
from qwen_env.errors import UsageError

if TYPE_CHECKING:
    from ppo_jax.config import OptimizerConfig, TrainConfig


def check_config(config: "TrainConfig") -> None:
    """Refuse values out of their range, and pairs of which one makes the other meaningless.

    Raises:
        UsageError: names the field, or both and the way out.
    """
    ppo, optimizer, run, task = config.ppo, config.optimizer, config.run, config.task
    for settings in (task, ppo, optimizer, run):
        check_ranges(settings)
    if ppo.num_minibatches > ppo.batch_size:
        raise UsageError(
            f"num_minibatches ({ppo.num_minibatches}) is larger than batch_size "
            f"({ppo.batch_size}): a minibatch would have no episode; lower num_minibatches."
        )
    parts = {"num_minibatches": ppo.num_minibatches, "num_microbatches": ppo.num_microbatches}
    for factors in (parts, {"completions_per_prompt": ppo.completions_per_prompt}):
        factors = factors | {"num_devices": run.num_devices}
        if ppo.batch_size % math.prod(factors.values()):
            named = {name: factor for name, factor in factors.items() if factor > 1}
            raise UsageError(
                f"batch_size ({ppo.batch_size}) must be a multiple of {' x '.join(named)} "
                f"({' x '.join(map(str, named.values()))})."
            )
    if task.min_new_tokens > task.max_new_tokens:
        raise UsageError(
            f"min_new_tokens ({task.min_new_tokens}) is above max_new_tokens "
            f"({task.max_new_tokens}); lower it."
        )
    if ppo.length_limit == "bootstrap" and ppo.gamma == 0:
        raise UsageError(
            "length_limit is 'bootstrap', but with gamma 0 the value of the last state counts for "
            "nothing; raise gamma, or set length_limit to 'score'."
        )
    if ppo.length_limit == "bootstrap" and task.missing_eos_penalty:
        raise UsageError(
            f"missing_eos_penalty ({task.missing_eos_penalty}) is taken off the score of a "
            "response that the limit cut off, but with length_limit 'bootstrap' that score is "
            "never paid; leave one of them out."
        )
    if ppo.target_kl is None:
        for name in ("target_kl_estimator", "target_kl_grain"):
            if _is_set(ppo, name):
                raise UsageError(
                    f"{name} is {getattr(ppo, name)!r}, but without target_kl nothing stops early; "
                    f"set target_kl, or leave {name} out."
                )
    if ppo.kl_coef == 0:
        for name in ("kl_penalty", "kl_target", "ref_ema_decay"):
            if _is_set(ppo, name):
                raise UsageError(
                    f"{name} is {getattr(ppo, name)}, but kl_coef is 0, so the reference model has "
                    f"no influence; raise kl_coef, or leave {name} out."
                )
    if ppo.kl_target is None and _is_set(ppo, "kl_horizon"):
        raise UsageError(
            f"kl_horizon is {ppo.kl_horizon}, but without kl_target kl_coef does not adapt; set "
            "kl_target, or leave kl_horizon out."
        )
    if ppo.kl_target is not None and ppo.kl_horizon < ppo.batch_size:
        raise UsageError(
            f"kl_horizon ({ppo.kl_horizon}) is below batch_size ({ppo.batch_size}), so kl_coef "
            "would change by more than a fifth in one iteration; raise kl_horizon."
        )
    if ppo.value_coef == 0:
        for name, given in (
            ("critic_warmup_iterations", optimizer.critic_warmup_iterations > 0),
            ("critic_learning_rate", optimizer.critic_learning_rate is not None),
            ("critic", ppo.critic == "separate"),
            ("value_clip_range", ppo.value_clip_range is not None),
        ):
            if given:
                raise UsageError(
                    f"{name} is set, but value_coef is 0, so the value function never learns; "
                    f"raise value_coef, or leave {name} out."
                )
    if run.num_iterations is not None:
        check_warmups(optimizer, run.num_iterations)


def check_warmups(optimizer: "OptimizerConfig", num_iterations: int) -> None:
    """Refuse warm-ups that would last for the whole run.

    Raises:
        UsageError: names the warm-up.
    """
    if optimizer.critic_warmup_iterations >= num_iterations:
        raise UsageError(
            f"critic_warmup_iterations ({optimizer.critic_warmup_iterations}) must be below "
            f"num_iterations ({num_iterations}); otherwise the policy would never learn."
        )
    names = ("critic_warmup_iterations", "warmup_iterations")  # one after the other
    warmups = {name: getattr(optimizer, name) for name in names if getattr(optimizer, name)}
    if sum(warmups.values()) >= num_iterations:
        raise UsageError(
            f"{' + '.join(warmups)} ({' + '.join(map(str, warmups.values()))}) must be below "
            f"num_iterations ({num_iterations}); otherwise the learning rate would never fall."
        )


def _is_set(settings: Any, name: str) -> bool:
    """Whether a field differs from its default."""
    return getattr(settings, name) != getattr(type(settings), name)
