"""What never learns, kept apart: it needs no gradients, no moments, and no copy for the reference.

With adapters, that is all of the backbones: the reference is the policy whose adapters are as they
were, which changes nothing.

The state that training changes holds what learns. The rest is on the device once, shared by the
policy and the reference model, and no checkpoint holds it: it is in the model that the run began
with.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ppo_jax.compilation import jit
from ppo_jax.config import AdamWConfig
from ppo_jax.learning.optimizer import Params
from ppo_jax.mesh import shardings
from ppo_jax.models import PolicyValueNetwork, RewardModel
from ppo_jax.models.lora import add_adapters, has_adapters, merged
from qwen_env.errors import UsageError

Network = TypeVar("Network", bound=PolicyValueNetwork | RewardModel)
State = TypeVar("State")

NOTHING: Params = nnx.State({})
"""Where everything learns."""


def partition(
    network: Network, config: AdamWConfig, seed: int = 0
) -> tuple[nnx.GraphDef[Network], Params, Params]:
    """The network without its arrays, those that learn, and those that are frozen for good.

    Embeddings and the lowest layers of the policy may be frozen; where only some of its layers are,
    they get a stack of their own. A critic's own backbone learns whatever the policy does. With
    `lora_rank` both backbones are frozen, and get adapters that learn; those that the network has
    already are merged into it.

    Args:
        seed: of the adapters.

    Raises:
        UsageError: no layer has the name of one of `lora_targets`, or more layers are to be frozen
            than there are, or all of those that would get adapters.
    """
    count, all_layers = config.num_frozen_layers, network.config.num_hidden_layers
    if count > all_layers:
        raise UsageError(
            f"num_frozen_layers is {count}, but the model has only {all_layers} layers "
            "(num_hidden_layers); lower it."
        )
    network = nnx.merge(*nnx.split(merged(network)))  # a module of its own, on the same arrays
    if 0 < count < all_layers:
        network.backbone.split_layers(count)
    names = {"lower_layers"}
    if config.freeze_embeddings:
        names.add("embed_tokens")
    if count == all_layers:
        names.add("layers")
    if config.lora_rank is not None:
        rank, alpha = config.lora_rank, config.lora_alpha or 2 * config.lora_rank
        if count == all_layers:
            raise UsageError(
                f"num_frozen_layers is {count}, so no layer is left for the adapters of lora_rank "
                f"{rank}; lower it, or leave one of them out."
            )
        for i, backbone in enumerate((network.backbone, getattr(network, "critic", None))):
            if backbone is not None:
                key = jax.random.fold_in(jax.random.key(seed), i)
                add_adapters(backbone, rank, alpha, config.lora_targets, key)

    def is_frozen(path: tuple[Any, ...], _: Any) -> bool:
        if config.lora_rank is not None:
            return path[0] in ("backbone", "critic") and "adapter" not in path
        return path[0] == "backbone" and path[1] in names

    graphdef, params = nnx.split(network)
    frozen, learning = nnx.split_state(params, is_frozen, ...)
    return graphdef, learning, frozen


def initial_state(init: Callable[[Params], State], params: Params, mesh: Mesh | None) -> State:
    """`init` of a copy of the parameters that learn, of which every device makes its own shards.

    A copy, since updates consume the state, and the reference or a caller may have its parameters.
    """

    def of_copy(params: Params) -> State:
        return init(jax.tree.map(jnp.copy, params))

    if mesh is not None:
        of_copy = jit(of_copy, out_shardings=shardings(jax.eval_shape(of_copy, params), mesh))
    return of_copy(params)


def network_of(graphdef: nnx.GraphDef[Network], params: Params, frozen: Params) -> Network:
    """The network of `partition` again, on the same arrays.

    Where some of its layers are frozen, the layers are a copy, in one stack; not where there are
    adapters.
    """
    network: Network = nnx.merge(graphdef, join(params, frozen))
    if network.backbone.lower_layers is not None and not has_adapters(network):
        network.backbone.join_layers()
    return network


def join(params: Params, frozen: Params) -> Params:
    """All parameters in one tree again, as the network of `partition` has them; no array is copied.

    Args:
        params: those that learn, or some of them.
    """
    joined: Params = nnx.merge_state(params, frozen)
    return joined
