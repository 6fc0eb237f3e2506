"""What never learns, kept apart: it needs no gradients, no moments, and no copy for the reference.

The state that training changes holds what learns. The rest is on the device once, shared by the
policy and the reference model, and no checkpoint holds it: it is in the model that the run began
with.
"""

from typing import Any

from flax import nnx

from ppo_jax.config import OptimizerConfig
from ppo_jax.learning.optimizer import Params
from ppo_jax.models import PolicyValueNetwork

NOTHING: Params = nnx.State({})
"""Where everything learns."""


def partition(
    network: PolicyValueNetwork, config: OptimizerConfig
) -> tuple[nnx.GraphDef[PolicyValueNetwork], Params, Params]:
    """The network without its arrays, those that learn, and those that are frozen for good.

    Embeddings and the lowest layers of the policy may be frozen; where only some of its layers are,
    they get a stack of their own. A critic's own backbone learns whatever the policy does.
    """
    count, all_layers = config.num_frozen_layers, network.config.num_hidden_layers
    if 0 < count < all_layers:
        whole, arrays = nnx.split(network)
        network = nnx.merge(whole, arrays)  # a module of its own, on the same arrays
        network.backbone.split_layers(count)
    names = {"lower_layers"}
    if config.freeze_embeddings:
        names.add("embed_tokens")
    if count == all_layers:
        names.add("layers")

    def is_frozen(path: tuple[Any, ...], _: Any) -> bool:
        return path[0] == "backbone" and path[1] in names

    graphdef, params = nnx.split(network)
    frozen, learning = nnx.split_state(params, is_frozen, ...)
    return graphdef, learning, frozen


def join(params: Params, frozen: Params) -> Params:
    """All parameters in one tree again, as the network of `partition` has them; no array is copied.

    Args:
        params: those that learn, or some of them.
    """
    joined: Params = nnx.merge_state(params, frozen)
    return joined
