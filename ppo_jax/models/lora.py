"""Low-rank adapters of a whole network (LoRA, arXiv:2106.09685): adding them, and merging them."""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from ppo_jax.models.decoder import Decoder
from ppo_jax.models.linear import Adapter, Linear
from qwen_env.errors import UsageError

Network = TypeVar("Network", bound=nnx.Module)


def add_adapters(
    decoder: Decoder, rank: int, alpha: float, targets: Sequence[str], key: PRNGKeyArray
) -> None:
    """Give linear layers of a decoder adapters that change nothing yet; not those in its
    `lower_layers`.

    A is drawn as `peft` draws it, uniformly within ±1/√in, and B is zero.

    Args:
        targets: the last parts of names, such as "q_proj" or "mlp.up_proj"; none means all.

    Raises:
        UsageError: no layer has the name of a target.
    """
    layers = dict(linear_layers(decoder))
    for target in targets:
        if not any(_is(name, target) for name in layers):
            raise UsageError(_no_such_target(target, list(layers)))
    for i, (name, linear) in enumerate(layers.items()):
        if targets and not any(_is(name, target) for target in targets):
            continue
        *stack, out_size, in_size = linear.weight.shape
        lora_a = jax.random.uniform(
            jax.random.fold_in(key, i), (*stack, rank, in_size), jnp.float32, -1, 1
        )
        linear.adapter = Adapter(
            lora_a / math.sqrt(in_size),
            jnp.zeros((*stack, out_size, rank), jnp.float32),
            alpha / rank,
        )


def linear_layers(decoder: Decoder) -> Iterator[tuple[str, Linear]]:
    """By name in a layer, such as "self_attn.q_proj"."""
    for path, module in nnx.iter_graph(decoder.layers):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def has_adapters(network: nnx.Module) -> bool:
    """Whether a linear layer has one."""
    return any(isinstance(module, Adapter) for _, module in nnx.iter_graph(network))


def merged(network: Network) -> Network:
    """The network with its adapters in its weights, its layers in one stack.

    Layers that have adapters are copies, and all are where some are frozen; the rest is shared.
    """
    if not has_adapters(network):
        return network
    same: Network = nnx.merge(*nnx.split(network))  # a module of its own, on the same arrays
    modules = [module for _, module in nnx.iter_graph(same)]
    for module in modules:
        if isinstance(module, Linear):
            module.merge_adapter()
    for module in modules:
        if isinstance(module, Decoder) and module.lower_layers is not None:
            module.join_layers()
    return same


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_such_target(target: str, names: Sequence[str]) -> str:
    last = [name.rpartition(".")[2] for name in names]
    near = difflib.get_close_matches(target, [*last, *names], n=2)
    meant = f"perhaps you meant {' or '.join(near)}" if near else f"it has {', '.join(last)}"
    return (
        f"lora_targets has {target!r}, but the model has no linear layer of that name; {meant}, "
        "and without lora_targets all of them get adapters."
    )
