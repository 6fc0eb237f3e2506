"""Epochs of the value function alone, which cost a pass of the critic and none of the policy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ppo_jax.learning.batch import Batch
from ppo_jax.learning.frozen import join
from ppo_jax.learning.optimizer import AdamState, Learns, Params, global_norm

_CRITIC = ("critic", "value_head")


def critic_epochs(
    params: Params,
    opt_state: AdamState,
    minibatch: Callable[[Int[Array, ""]], Batch],
    *,
    numbers: tuple[Int[Array, ""], int],
    gradients: Callable[[Params, Params, Batch], Params],
    update: Callable[..., tuple[Params, AdamState]],
    mesh: Mesh | None,
) -> tuple[Params, AdamState]:
    """All parameters and moments after some minibatches of the critic; the policy's are the same.

    A minibatch whose gradient is not finite is skipped.

    Args:
        minibatch: of each number.
        numbers: of the first minibatch, and the one that is behind the last.
        gradients: of the critic's parameters, given those of the policy.
        update: of the optimizer.
    """

    def of_critic(tree: Params) -> Params:
        return nnx.State({name: x for name, x in tree.items() if name in _CRITIC})

    policy = nnx.State({name: x for name, x in params.items() if name not in _CRITIC})

    def one_step(carry: tuple[Array, Params, AdamState]) -> tuple[Array, Params, AdamState]:
        number, critic, state = carry
        of_critic = gradients(critic, policy, minibatch(number))
        norm = global_norm(of_critic, mesh)
        learns = Learns(False, jnp.isfinite(norm))
        updates, state = update(of_critic, state, critic, norm=norm, learns=learns)
        return number + 1, optax.apply_updates(critic, updates), state

    first, end = numbers
    moments = opt_state._replace(mu=of_critic(opt_state.mu), nu=of_critic(opt_state.nu))
    _, critic, moments = jax.lax.while_loop(
        lambda carry: carry[0] < end, one_step, (first, of_critic(params), moments)
    )
    return join(critic, policy), moments._replace(
        mu=nnx.State({**opt_state.mu, **moments.mu}), nu=nnx.State({**opt_state.nu, **moments.nu})
    )
