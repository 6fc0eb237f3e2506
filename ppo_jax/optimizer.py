"""AdamW, the learning rate's schedule, and which parameters learn."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from ppo_jax.config import OptimizerConfig

Params = nnx.State


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) at learning rate 1, behind a gradient-norm clip.

    The learner scales its updates by `learning_rate_schedule`, which depends on the iteration: a
    KL early stop takes fewer optimizer steps and must not stretch the schedule.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=_is_decayed),
        optax.scale(-1.0),
    )


def learning_rate_schedule(config: OptimizerConfig, num_iterations: int) -> optax.Schedule:
    """The learning rate of each iteration: a linear warm-up, then the schedule down to zero."""
    peak, warmup = config.learning_rate, config.warmup_iterations
    rest = max(num_iterations - warmup, 1)
    falling = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return falling
    # The first iteration is the first step of the ramp, not a step of length zero.
    rising = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rising, falling], [warmup])


def learning_share(params: Params, config: OptimizerConfig, iteration: Int[Array, ""]) -> Any:
    """1 for what learns in an iteration, 0 for what does not, broadcastable to each parameter.

    Embeddings and the lowest layers may be frozen for good. During the critic's warm-up only the
    value function learns: its head, and its backbone where it has one of its own.
    """
    policy_learns = jnp.where(iteration < config.critic_warmup_iterations, 0.0, 1.0)

    def share(path: tuple[Any, ...], x: Array) -> Array | float:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.startswith(("value_head", "critic")):
            return 1.0
        learns = policy_learns if config.critic_warmup_iterations else 1.0
        if "embed_tokens" in name and config.freeze_embeddings:
            return 0.0
        if ".layers." in name and config.num_frozen_layers:
            is_free = jnp.arange(x.shape[0]) >= config.num_frozen_layers
            return learns * is_free.astype(jnp.float32).reshape(-1, *[1] * (x.ndim - 1))
        return learns

    return jax.tree_util.tree_map_with_path(share, params)


def _is_decayed(params: Params) -> Any:
    """True for matrices, False for norms and biases (which are stacked, so rank does not tell)."""

    def is_matrix(path: tuple[Any, ...], _: Array) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(is_matrix, params)
