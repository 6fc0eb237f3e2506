"""AdamW, the learning rate's schedule, and what learns when."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.config import OptimizerConfig
from ppo_jax.mesh import sum_over_arrays

Params = nnx.State[Any, Any]


class Learns(NamedTuple):
    """Which of the two learn from a gradient."""

    policy: Bool[Array, ""] | bool
    critic: Bool[Array, ""] | bool  # the value head, and its backbone where it has one of its own

    def of_each(self, params: Params) -> Any:
        """Whether each of some parameters learns."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.critic if _is_critic(_name(path)) else self.policy, params
        )

    def masked(self, gradients: Params) -> Params:
        """The gradients, 0 where nothing learns from them."""
        if self.policy is True and self.critic is True:
            return gradients
        masked: Params = jax.tree.map(jnp.multiply, gradients, self.of_each(gradients))
        return masked


class AdamState(NamedTuple):
    """Adam's moments, and how many steps they are made of.

    Those of the policy and of its critic are counted apart, since each may learn while the other
    does not.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # the policy's; it hides tuple.count
    critic_count: Int[Array, ""]
    mu: Params
    nu: Params


def adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv:1711.05101) on clipped gradients.

    Written out, because memory bounds it: every array is read and written once, in its place. A
    chain of optax's transformations whose result is then taken or left copies all of them.

    The second moments are float32 whatever the parameters are: a step's decay, a thousandth, is
    less than bfloat16 can tell.

    Beside gradients, state and parameters, `update` takes:
        norm: of all gradients together.
        learning_rate: of the policy; the critic's is in the same proportion as in `config`.
        learns: whose moments and parameters change; the others' updates are 0.
    """
    b1, b2 = config.adam_b1, config.adam_b2
    critic_factor = (config.critic_learning_rate or config.learning_rate) / config.learning_rate

    def init(params: Params) -> AdamState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return AdamState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), mu, nu)

    def update(
        gradients: Params,
        state: AdamState,
        params: Params,
        *,
        norm: Float[Array, ""],
        learning_rate: Float[Array, ""],
        learns: Learns,
    ) -> tuple[Params, AdamState]:
        count, critic_count = state.count + learns.policy, state.critic_count + learns.critic
        clip = jnp.where(norm < config.max_grad_norm, 1.0, config.max_grad_norm / norm)
        adam_step, critic_adam_step = (_adam_step(x, config) for x in (count, critic_count))
        each = learns.of_each(params)

        def averaged(
            old: Array, new: Array, applied: Array, decay: float, scale: Array | float
        ) -> Array:
            average = decay * old + ((1 - decay) * scale) * new
            return jnp.where(applied, average, old).astype(old.dtype)

        def updated(path: tuple[Any, ...], x: Array, mu: Array, nu: Array, applied: Array) -> Array:
            name = _name(path)
            of_critic = _is_critic(name)
            step = (critic_adam_step if of_critic else adam_step)(mu, nu)
            if _is_decayed(name):
                step = step + config.weight_decay * x
            rate = learning_rate * (critic_factor if of_critic else 1.0)
            return jnp.where(applied, -rate * step, 0.0)

        # In mu the clip goes into the factor: were `clip * g` in both, XLA would keep a copy of it.
        mu = jax.tree.map(
            lambda old, g, applied: averaged(old, g, applied, b1, clip), state.mu, gradients, each
        )
        nu = jax.tree.map(
            lambda old, g, applied: averaged(old, (clip * g) ** 2, applied, b2, 1),
            *(state.nu, gradients, each),
        )
        updates = jax.tree_util.tree_map_with_path(updated, params, mu, nu, each)
        return updates, AdamState(count, critic_count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _adam_step(
    count: Int[Array, ""], config: OptimizerConfig
) -> Callable[[Float[Array, "*shape"], Float[Array, "*shape"]], Float[Array, "*shape"]]:
    """From both moments after `count` steps to m̂ / (√v̂ + ε), which the learning rate scales."""
    count = jnp.maximum(count, 1)  # before the first step the moments are 0, and so is this
    unbias1, unbias2 = 1 - config.adam_b1**count, 1 - config.adam_b2**count
    return lambda mu, nu: (mu / unbias1) / (jnp.sqrt(nu / unbias2) + config.adam_eps)


def mean_step(
    state: AdamState, config: OptimizerConfig, mesh: Mesh | None = None
) -> Float[Array, ""]:
    """Mean |Adam's last step| / learning rate of the policy's parameters; 0 before the first.

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

    policy = (jax.tree.leaves(tree["backbone"]) for tree in (state.mu, state.nu))
    total = count = jnp.zeros(())
    for mu, nu in zip(*policy, strict=True):
        total += jnp.abs(adam_step(some(mu), some(nu))).sum()
        count += some(jnp.ones(mu.shape)).sum()
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


def learning_rate_schedule(
    config: OptimizerConfig, num_iterations: int, held: Int[Array, ""] | int | None = None
) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """The learning rate of each iteration: a linear warm-up, then the schedule.

    Both begin when the policy does learn: during the critic's warm-up the rate is the peak.

    Args:
        held: iterations of the critic's warm-up; None makes it `critic_warmup_iterations`.
    """
    begin = config.critic_warmup_iterations if held is None else held
    rising = config.warmup_iterations
    falling = jnp.maximum(num_iterations - begin - rising, 1)

    def schedule(iteration: Int[Array, ""] | int) -> Float[Array, ""]:
        done = jnp.asarray(iteration - begin, jnp.float32)
        part = jnp.clip((done - rising) / falling, 0, 1)
        left = {
            "constant": jnp.ones_like(part),
            "linear": 1 - part,
            "cosine": (1 + jnp.cos(jnp.pi * part)) / 2,
        }[config.schedule]
        # The first iteration is the first step of the ramp, not a step of length zero.
        risen = (done + 1) / max(rising, 1)
        share = jnp.where(done < 0, 1.0, jnp.where(done < rising, risen, left))
        return config.learning_rate * share

    return schedule


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_critic(name: str) -> bool:
    """Of the value head, or of its backbone where it has one of its own."""
    return name.startswith(("value_head", "critic"))


def _is_decayed(name: str) -> bool:
    """Matrices are, norms and biases not (which are stacked, so rank does not tell)."""
    return "norm" not in name and "bias" not in name
