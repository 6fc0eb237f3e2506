"""What is put on the backbone: a policy with a value head, and a reward model."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from ppo_jax.algorithm import Bins, expected_value
from ppo_jax.models.config import DecoderConfig
from ppo_jax.models.decoder import Decoder, last_hidden, project
from ppo_jax.models.lora import merged
from qwen_env.errors import UsageError


class ScalarHead(nnx.Module):
    """One float32 number a position, w·h (+ b): the head of values and of rewards."""

    def __init__(self, weight: Float[Array, "D"], *, bias: bool):
        self.weight = nnx.Param(weight[None, :].astype(jnp.float32))
        self.bias = nnx.Param(jnp.zeros((1,), jnp.float32)) if bias else None

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        y = jnp.einsum("...d,d->...", hidden.astype(jnp.float32), self.weight[0])
        return y if self.bias is None else y + self.bias[0]


class HistogramHead(nnx.Module):
    """A value as the mean of a histogram over K bins (`ppo_jax.algorithm.hl_gauss`), in float32.

    It starts at zero: every bin is as likely, and all values are the middle of the range.
    """

    def __init__(self, hidden_size: int, bins: Bins):
        self.weight = nnx.Param(jnp.zeros((bins.number, hidden_size), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((bins.number,), jnp.float32))
        self.low, self.high = bins.low, bins.high

    @property
    def bins(self) -> Bins:
        return Bins(self.low, self.high, self.bias.shape[0])

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch K"]:
        """Of the bins."""
        weight = self.weight[...]
        return jnp.einsum("...d,kd->...k", hidden.astype(jnp.float32), weight) + self.bias[...]

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        return expected_value(self.logits(hidden), self.bins)


ValueHead = ScalarHead | HistogramHead


def make_value_head(hidden_size: int, bins: Bins | None) -> ValueHead:
    """Of zeros: one number or, with `bins`, a histogram."""
    if bins is not None:
        return HistogramHead(hidden_size, bins)
    return ScalarHead(jnp.zeros((hidden_size,)), bias=True)


class PolicyValueNetwork(nnx.Module):
    """A policy, and a value function on its backbone or on one of its own.

    The value head starts at zero, so that the first advantages are those of a zero baseline
    rather than of random numbers.

    Args:
        separate_critic: give the value function a backbone of its own, `critic`.
        bins: let the value be the mean of a histogram over these.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        separate_critic: bool = False,
        bins: Bins | None = None,
    ):
        self.backbone = Decoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.critic: Decoder | None = nnx.data(
            Decoder(_without_projection(config), rngs=rngs, dtype=dtype, param_dtype=param_dtype)
            if separate_critic
            else None
        )
        self.value_head = make_value_head(config.hidden_size, bins)

    @property
    def config(self) -> DecoderConfig:
        return self.backbone.config

    def __call__(
        self, input_ids: Int[Array, "B S"], attention_mask: Int[Array, "B S"] | Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S V"], Float[Array, "B S"]]:
        """Logits and values of every position, in float32: for looking at small inputs.

        Training never takes this path, see `ppo_jax.learning.response_outputs`.
        """
        hidden, _ = self.backbone(input_ids, attention_mask)
        value_hidden = self.critic(input_ids, attention_mask)[0] if self.critic else hidden
        return self.logits(hidden), self.value_head(value_hidden)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits of the tokens that follow."""
        return project(hidden, self.backbone.unembedding)


class ValueFunction(nnx.Module):
    """A decoder and a value head, without a policy: what a separate critic can begin as."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        bins: Bins | None = None,
    ):
        config = _without_projection(config)
        self.backbone = Decoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.value_head = make_value_head(config.hidden_size, bins)

    @property
    def config(self) -> DecoderConfig:
        return self.backbone.config

    def __call__(
        self, input_ids: Int[Array, "B S"], attention_mask: Int[Array, "B S"] | Bool[Array, "B S"]
    ) -> Float[Array, "B S"]:
        """float32 values of every position."""
        return self.value_head(self.backbone(input_ids, attention_mask)[0])


def with_separate_critic(
    network: PolicyValueNetwork, critic: ValueFunction | None = None
) -> PolicyValueNetwork:
    """The network with a backbone for its values alone.

    It is that of `critic`, with its head, and else the one that the network has for itself
    already, or the policy's. Its arrays are shared, at first; adapters are merged.

    Raises:
        UsageError: `critic` is of another size than the policy, and the sentence names the size.
    """
    if critic is None and network.critic is not None:
        return network
    network = nnx.merge(*nnx.split(merged(network)))  # a module of its own, on the same arrays
    if critic is not None:
        _check_same_size(network.config, critic.config)
        network.value_head = nnx.merge(*nnx.split(critic.value_head))
    config, dtype = _without_projection(network.config), network.backbone.dtype
    shaped = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    backbone = nnx.state((critic or network).backbone)
    # Variables of its own, or they would be one parameter.
    own = jax.tree.map(lambda x: x, {n: x for n, x in backbone.items() if n != "lm_head"})
    network.critic = nnx.merge(nnx.graphdef(shaped), nnx.State(own))
    return network


def with_value_bins(network: PolicyValueNetwork, bins: Bins | None) -> PolicyValueNetwork:
    """The network whose value is the mean of a histogram over `bins`, or one number.

    A head of one number gives way to one of zeros.

    Raises:
        UsageError: it has a head of other bins already.
    """
    head = network.value_head
    there = head.bins if isinstance(head, HistogramHead) else None
    if there == bins:
        return network
    if there is not None:
        wanted = f"value_bins {bins.number}" if bins else "value_loss 'squared'"
        raise UsageError(
            f"The value head has {there.number} bins from {there.low:g} to {there.high:g}, which "
            f"does not go with {wanted}; set value_loss to 'hl_gauss', with that value_range and "
            "those value_bins, or take another model."
        )
    network = nnx.merge(*nnx.split(network))
    network.value_head = make_value_head(network.config.hidden_size, bins)
    return network


class RewardModel(nnx.Module):
    """A decoder with one score at the last real token: a `Qwen2ForSequenceClassification`, say."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        std = 1 / math.sqrt(config.hidden_size + 1)
        config = _without_projection(config)
        self.backbone = Decoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.score = ScalarHead(
            std * jax.random.normal(rngs.params(), (config.hidden_size,)), bias=False
        )

    @property
    def config(self) -> DecoderConfig:
        return self.backbone.config

    def __call__(
        self, input_ids: Int[Array, "B S"], attention_mask: Int[Array, "B S"] | Bool[Array, "B S"]
    ) -> Float[Array, "B"]:
        """float32 scores of right-padded sequences."""
        hidden, _ = self.backbone(input_ids, attention_mask)
        return self.score(last_hidden(hidden, jnp.sum(attention_mask, axis=-1)))


def as_reward_model(policy: PolicyValueNetwork, seed: int) -> RewardModel:
    """A reward model on a policy's backbone, whose arrays it shares; its head is random."""
    config, dtype = policy.config, policy.backbone.dtype
    shaped = nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0), dtype=dtype))
    std = 1 / math.sqrt(config.hidden_size + 1)
    weight = std * jax.random.normal(jax.random.key(seed), (1, config.hidden_size))
    backbone = {name: x for name, x in nnx.state(policy.backbone).items() if name != "lm_head"}
    score = nnx.State({"weight": nnx.Param(weight)})
    params: nnx.State[str, Any] = nnx.State({"backbone": nnx.State(backbone), "score": score})
    merged: RewardModel = nnx.merge(nnx.graphdef(shaped), params)
    return merged


def _check_same_size(policy: DecoderConfig, critic: DecoderConfig) -> None:
    policy = dataclasses.replace(
        _without_projection(policy), max_position_embeddings=critic.max_position_embeddings
    )
    for field in dataclasses.fields(DecoderConfig):
        ours, theirs = (getattr(config, field.name) for config in (policy, critic))
        if ours != theirs:
            raise UsageError(
                f"The critic's {field.name} is {theirs}, and the policy's is {ours}; take a critic "
                "that was made from a model of the policy's size."
            )


def _without_projection(config: DecoderConfig) -> DecoderConfig:
    """Of a network that writes no tokens, whatever the policy that it came from has."""
    return dataclasses.replace(config, tie_word_embeddings=True)
