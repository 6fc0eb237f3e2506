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

    def apart(tree: Params) -> tuple[Params, Params]:
        critic, policy = nnx.split_state(tree, lambda path, _: path[0] in _CRITIC, ...)
        return critic, policy

    (critic, policy), (mu, policy_mu), (nu, policy_nu) = map(
        apart, (params, opt_state.mu, opt_state.nu)
    )

    def one_step(carry: tuple[Array, Params, AdamState]) -> tuple[Array, Params, AdamState]:
        number, critic, state = carry
        of_critic = gradients(critic, policy, minibatch(number))
        norm = global_norm(of_critic, mesh)
        learns = Learns(False, jnp.isfinite(norm))
        updates, state = update(of_critic, state, critic, norm=norm, learns=learns)
        return number + 1, optax.apply_updates(critic, updates), state

    first, end = numbers
    _, critic, state = jax.lax.while_loop(
        lambda carry: carry[0] < end, one_step, (first, critic, opt_state._replace(mu=mu, nu=nu))
    )
    return join(critic, policy), state._replace(
        mu=join(state.mu, policy_mu), nu=join(state.nu, policy_nu)
    )
