"""Supervised learning: what PPO is compared with, and what it may begin from."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ppo_jax.algorithm import masked_mean
from ppo_jax.learning.response_outputs import response_outputs
from ppo_jax.sampling import Sampling
from qwen_env import mdp

Carry = tuple[nnx.State, optax.OptState]


def in_random_order(
    count: int, *, num_epochs: int, batch_size: int, rng: np.random.Generator
) -> Int[np.ndarray, "steps batch"]:
    """Rows of batches; what is left of an epoch goes into no batch."""
    whole = count // batch_size * batch_size
    orders = [rng.permutation(count)[:whole] for _ in range(num_epochs)]
    return np.concatenate(orders).reshape(-1, batch_size)


@partial(jax.jit, static_argnames=("graphdef", "rules", "sampling", "optimizer"))
def maximise_likelihood(
    graphdef: Any,
    params: nnx.State,
    episodes: mdp.State,
    batches: Int[Array, "steps batch"],
    *,
    rules: mdp.Rules,
    sampling: Sampling,
    optimizer: optax.GradientTransformation,
) -> nnx.State:
    """`params` after a step on the policy's own tokens in each batch of the episodes."""

    def loss(params: nnx.State, batch: mdp.State) -> Float[Array, ""]:
        own = mdp.response_mask(batch, rules.max_new_tokens, jnp)
        outputs = response_outputs(
            nnx.merge(graphdef, params),
            batch.tokens,
            batch.prompt_length,
            batch.length,
            own=None if batch.own is None else own,
            rules=rules,
            sampling=sampling,
        )
        return -masked_mean(outputs.logprobs, own)

    def step(carry: Carry, rows: Int[Array, "batch"]) -> tuple[Carry, None]:
        params, opt_state = carry
        gradient = jax.grad(loss)(params, mdp.at(episodes, rows))
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]
