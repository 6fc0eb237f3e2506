"""Which settings are refused, before anything is loaded or compiled."""

import math
from typing import TYPE_CHECKING

from qwen_env.errors import UsageError

if TYPE_CHECKING:
    from ppo_jax.config import OptimizerConfig, TrainConfig


def check_ranges(config: "TrainConfig") -> None:
    """Refuse values that no run could have.

    Raises:
        UsageError: a field is out of its range.
    """
    ppo, optimizer, run, task = config.ppo, config.optimizer, config.run, config.task
    ppo.sampling.check()
    at_least: dict[str, tuple[float | None, float]] = {
        "batch_size": (ppo.batch_size, 1),
        "completions_per_prompt": (ppo.completions_per_prompt, 1),
        "num_minibatches": (ppo.num_minibatches, 1),
        "num_microbatches": (ppo.num_microbatches, 1),
        "num_packed_sizes": (ppo.num_packed_sizes, 1),
        "num_epochs": (ppo.num_epochs, 1),
        "kl_horizon": (ppo.kl_horizon, 1),
        "num_devices": (run.num_devices, 1),
        "num_iterations": (run.num_iterations, 1),
        "num_prompt_epochs": (run.num_prompt_epochs, 1),
        "eval_every": (run.eval_every, 1),
        "eval_size": (run.eval_size, 1),
        "save_every": (run.save_every, 1),
        "keep_checkpoints": (run.keep_checkpoints, 1),
        "max_nonfinite_updates": (optimizer.max_nonfinite_updates, 1),
        "warmup_iterations": (optimizer.warmup_iterations, 0),
        "critic_warmup_iterations": (optimizer.critic_warmup_iterations, 0),
        "num_frozen_layers": (optimizer.num_frozen_layers, 0),
        "kl_coef": (ppo.kl_coef, 0),
        "value_coef": (ppo.value_coef, 0),
        "entropy_coef": (ppo.entropy_coef, 0),
        "weight_decay": (optimizer.weight_decay, 0),
        "adam_eps": (optimizer.adam_eps, 0),
        "missing_eos_penalty": (task.missing_eos_penalty, 0),
    }
    for name, (value, least) in at_least.items():
        if value is not None and not value >= least:  # NaN is refused as well
            raise UsageError(f"{name} is {value}; it must be at least {least}.")
    above: dict[str, tuple[float | None, float]] = {
        "clip_range": (ppo.clip_range, 0),
        "clip_range_high": (ppo.clip_range_high, 0),
        "value_clip_range": (ppo.value_clip_range, 0),
        "dual_clip": (ppo.dual_clip, 1),
        "score_clip": (ppo.score_clip, 0),
        "kl_target": (ppo.kl_target, 0),
        "target_kl": (ppo.target_kl, 0),
        "learning_rate": (optimizer.learning_rate, 0),
        "critic_learning_rate": (optimizer.critic_learning_rate, 0),
        "max_grad_norm": (optimizer.max_grad_norm, 0),
    }
    for name, (value, bound) in above.items():
        if value is not None and not value > bound:
            raise UsageError(f"{name} is {value}; it must be above {bound}.")
    # An infinite bound, such as max_grad_norm, bounds nothing; an infinite factor ends in NaN.
    factors = {name: value for name, (value, _) in at_least.items()} | {
        "learning_rate": optimizer.learning_rate,
        "critic_learning_rate": optimizer.critic_learning_rate,
    }
    for name, value in factors.items():
        if value == math.inf:
            raise UsageError(f"{name} is {value}; it must be finite.")
    for name, value in (("gamma", ppo.gamma), ("gae_lambda", ppo.gae_lambda)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name} is {value}; it must lie between 0 and 1.")
    below_one: dict[str, float | None] = {
        "adam_b1": optimizer.adam_b1,
        "adam_b2": optimizer.adam_b2,
        "ref_ema_decay": ppo.ref_ema_decay,
    }
    for name, value in below_one.items():
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 0 and below 1.")


def check_contradictions(config: "TrainConfig") -> None:
    """Refuse pairs of settings of which one makes the other meaningless.

    Raises:
        UsageError: names both, and the way out.
    """
    ppo, optimizer, run, task = config.ppo, config.optimizer, config.run, config.task
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
        for name, value, default in (
            ("target_kl_estimator", ppo.target_kl_estimator, "k3"),
            ("target_kl_grain", ppo.target_kl_grain, "minibatch"),
        ):
            if value != default:
                raise UsageError(
                    f"{name} is {value!r}, but without target_kl nothing stops early; set "
                    f"target_kl, or leave {name} out."
                )
    if ppo.kl_coef == 0:
        for name, given in (
            ("kl_penalty", ppo.kl_penalty != "k1"),
            ("kl_target", ppo.kl_target is not None),
            ("ref_ema_decay", ppo.ref_ema_decay is not None),
        ):
            if given:
                raise UsageError(
                    f"{name} is {getattr(ppo, name)}, but kl_coef is 0, so the reference model has "
                    f"no influence; raise kl_coef, or leave {name} out."
                )
    if ppo.kl_target is None and ppo.kl_horizon != type(ppo).kl_horizon:
        raise UsageError(
            f"kl_horizon is {ppo.kl_horizon}, but without kl_target kl_coef does not adapt; set "
            "kl_target, or leave kl_horizon out."
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
    """Refuse a warm-up that would last for the whole run.

    Raises:
        UsageError: names the warm-up.
    """
    if optimizer.warmup_iterations >= num_iterations:
        raise UsageError(
            f"warmup_iterations ({optimizer.warmup_iterations}) must be below num_iterations "
            f"({num_iterations}); otherwise the learning rate would never fall."
        )
    if optimizer.critic_warmup_iterations >= num_iterations:
        raise UsageError(
            f"critic_warmup_iterations ({optimizer.critic_warmup_iterations}) must be below "
            f"num_iterations ({num_iterations}); otherwise the policy would never learn."
        )
