"""AdamW, the learning rate's schedule, and what learns when."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.config import OptimizerConfig
from ppo_jax.mesh import sum_over_arrays

Params = nnx.State[Any, Any]


def adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv:1711.05101) on clipped gradients.

    Written out, because memory bounds it: every array is read and written once, in its place. A
    chain of optax's transformations whose result is then taken or left copies all of them.

    The second moments are float32 whatever the parameters are: a step's decay, a thousandth, is
    less than bfloat16 can tell.

    Beside gradients, state and parameters, `update` takes:
        norm: of all gradients together.
        learning_rate: of the policy; the critic's is in the same proportion as in `config`.
        trainable: the mask of `trainable_mask`.
        applied: False leaves the state as it is, and makes all updates 0.
    """
    b1, b2 = config.adam_b1, config.adam_b2
    critic_factor = (config.critic_learning_rate or config.learning_rate) / config.learning_rate

    def init(params: Params) -> optax.ScaleByAdamState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        gradients: Params,
        state: optax.ScaleByAdamState,
        params: Params,
        *,
        norm: Float[Array, ""],
        learning_rate: Float[Array, ""],
        trainable: Any,
        applied: Bool[Array, ""],
    ) -> tuple[Params, optax.ScaleByAdamState]:
        count = state.count + applied
        clip = jnp.where(norm < config.max_grad_norm, 1.0, config.max_grad_norm / norm)
        adam_step = _adam_step(count, config)

        def averaged(old: Array, new: Array, decay: float, scale: Array | float) -> Array:
            average = decay * old + ((1 - decay) * scale) * new
            return jnp.where(applied, average, old).astype(old.dtype)

        def updated(path: tuple[Any, ...], x: Array, mu: Array, nu: Array, learns: Any) -> Array:
            name = _name(path)
            step = adam_step(mu, nu)
            if _is_decayed(name):
                step = step + config.weight_decay * x
            rate = learning_rate * (critic_factor if _is_critic(name) else 1.0)
            return jnp.where(applied, -rate * learns * step, 0.0)

        # In mu the clip goes into the factor: were `clip * g` in both, XLA would keep a copy of it.
        mu = jax.tree.map(lambda old, g: averaged(old, g, b1, clip), state.mu, gradients)
        nu = jax.tree.map(lambda old, g: averaged(old, (clip * g) ** 2, b2, 1), state.nu, gradients)
        updates = jax.tree_util.tree_map_with_path(updated, params, mu, nu, trainable)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _adam_step(
    count: Int[Array, ""], config: OptimizerConfig
) -> Callable[[Float[Array, "*shape"], Float[Array, "*shape"]], Float[Array, "*shape"]]:
    """From both moments after `count` steps to m̂ / (√v̂ + ε), which the learning rate scales."""
    count = jnp.maximum(count, 1)  # before the first step the moments are 0, and so is this
    unbias1, unbias2 = 1 - config.adam_b1**count, 1 - config.adam_b2**count
    return lambda mu, nu: (mu / unbias1) / (jnp.sqrt(nu / unbias2) + config.adam_eps)


def mean_step(
    state: optax.ScaleByAdamState,
    trainable: Any,
    config: OptimizerConfig,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """Mean |Adam's last step| / learning rate of the policy's parameters that learn.

    Near 1 while Adam follows the signs of gradients; far below where `adam_eps` is larger than
    they are, so that a step is in proportion to them. Weight decay is not in it. Of every sixteenth
    row of each matrix, so that it costs next to nothing.
    """
    adam_step = _adam_step(state.count, config)

    def some(x: Array) -> Array:
        if mesh is None:
            return x.reshape(-1, x.shape[-1])[::16]
        row = jnp.arange(x.size // x.shape[-1]).reshape(*x.shape[:-1], 1)
        return jnp.where(row % 16 == 0, x, 0)  # what is cut over devices stays as it lies

    policy = (jax.tree.leaves(tree["backbone"]) for tree in (state.mu, state.nu, trainable))
    total = count = jnp.zeros(())
    for mu, nu, learns in zip(*policy, strict=True):
        total += jnp.abs(adam_step(some(mu), some(nu))).sum()  # of what does not learn, 0
        count += some(jnp.broadcast_to(learns, mu.shape)).sum()
    return total / jnp.maximum(count, 1)


def global_norm(gradients: Params, mesh: Mesh | None = None) -> Float[Array, ""]:
    """The Euclidean norm of all gradients together, in float32."""
    return jnp.sqrt(sum_over_arrays(_sum_of_squares, gradients, mesh))


def _sum_of_squares(x: Float[Array, "..."]) -> Float[Array, ""]:
    """In the way that is fast on each platform."""
    total: Array = jax.lax.platform_dependent(
        x, cpu=_sum_of_sixteenths, default=lambda x: jnp.square(x.astype(jnp.float32)).sum()
    )
    return total


def _sum_of_sixteenths(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Of an array's sixteenths added up, then of what is left.

    XLA:CPU writes the squares of an array to memory before it sums them; their sum over sixteen
    parts it computes as it reads, twelve times as fast. A TPU would lay the array out anew.
    """
    flat = x.reshape(-1)
    parts = flat[: flat.size // 16 * 16].reshape(16, -1)
    rest = flat[parts.size :]

    def squares(x: Array) -> Array:
        return jnp.square(x.astype(jnp.float32))

    return reduce(jnp.add, map(squares, parts)).sum() + squares(rest).sum()


def learning_rate_schedule(config: OptimizerConfig, num_iterations: int) -> optax.Schedule:
    """The learning rate of each iteration: a linear warm-up, then the schedule.

    Both begin when the policy does learn: during the critic's warm-up the rate is the peak.
    """
    peak, held = config.learning_rate, config.critic_warmup_iterations
    warmup = config.warmup_iterations
    rest = max(num_iterations - held - warmup, 1)
    falling = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    # The first iteration is the first step of the ramp, not a step of length zero.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    level = optax.constant_schedule(peak)
    return optax.join_schedules([level, rising, falling], [held, held + warmup])


def trainable_mask(params: Params, config: OptimizerConfig, iteration: Int[Array, ""]) -> Any:
    """1 for what learns in an iteration, 0 for what does not, for each parameter.

    During the critic's warm-up only the value function learns: its head, and its backbone where it
    has one of its own. (What never learns is not here, see `ppo_jax.learning.frozen`.)
    """
    policy_learns: Array | float = 1.0
    if config.critic_warmup_iterations:
        policy_learns = jnp.where(iteration < config.critic_warmup_iterations, 0.0, 1.0)

    def learns(path: tuple[Any, ...], _: Array) -> Array | float:
        return 1.0 if _is_critic(_name(path)) else policy_learns

    return jax.tree_util.tree_map_with_path(learns, params)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_critic(name: str) -> bool:
    """Of the value head, or of its backbone where it has one of its own."""
    return name.startswith(("value_head", "critic"))


def _is_decayed(name: str) -> bool:
    """Matrices are, norms and biases not (which are stacked, so rank does not tell)."""
    return "norm" not in name and "bias" not in name
