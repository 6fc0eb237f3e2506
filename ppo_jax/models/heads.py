"""What is put on the backbone: a policy with a value head, and a reward model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from ppo_jax.models.config import Qwen2Config
from ppo_jax.models.qwen2 import Qwen2


class ScalarHead(nnx.Module):
    """One float32 number a position, w·h (+ b): the head of values and of rewards."""

    def __init__(self, weight: Float[Array, "D"], *, bias: bool):
        self.weight = nnx.Param(weight[None, :].astype(jnp.float32))
        self.bias = nnx.Param(jnp.zeros((1,), jnp.float32)) if bias else None

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        y = jnp.einsum("...d,d->...", hidden.astype(jnp.float32), self.weight[0])
        return y if self.bias is None else y + self.bias[0]


class PolicyValueNetwork(nnx.Module):
    """A Qwen2 policy and a value function on one backbone.

    The value head starts at zero, so that the first advantages are those of a zero baseline
    rather than of random numbers.
    """

    def __init__(
        self,
        config: Qwen2Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.backbone = Qwen2(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.value_head = ScalarHead(jnp.zeros((config.hidden_size,)), bias=True)

    @property
    def config(self) -> Qwen2Config:
        return self.backbone.config

    def __call__(
        self, input_ids: Int[Array, "B S"], attention_mask: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S V"], Float[Array, "B S"]]:
        """Logits and values of every position, in float32: for looking at small inputs.

        Training never takes this path, see `ppo_jax.models.response`.
        """
        hidden, _ = self.backbone(input_ids, attention_mask)
        return self.logits(hidden), self.value_head(hidden)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits of the tokens that follow."""
        weight = self.backbone.unembedding.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)


class RewardModel(nnx.Module):
    """A Qwen2 with one score at the last real token (`Qwen2ForSequenceClassification`)."""

    def __init__(
        self,
        config: Qwen2Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        std = 1 / math.sqrt(config.hidden_size + 1)
        # It writes no tokens, so it has no output projection, whatever the policy it came from has.
        config = dataclasses.replace(config, tie_word_embeddings=True)
        self.backbone = Qwen2(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.score = ScalarHead(
            std * jax.random.normal(rngs.params(), (config.hidden_size,)), bias=False
        )

    @property
    def config(self) -> Qwen2Config:
        return self.backbone.config

    def __call__(
        self, input_ids: Int[Array, "B S"], attention_mask: Bool[Array, "B S"]
    ) -> Float[Array, "B"]:
        """float32 scores of right-padded sequences."""
        hidden, _ = self.backbone(input_ids, attention_mask)
        last = jnp.sum(attention_mask, axis=-1) - 1
        return self.score(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
