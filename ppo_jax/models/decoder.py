"""The decoder of Qwen2, Qwen3 and Llama, as Flax NNX modules.

L pre-norm layers: grouped-query attention with rotary positions, then a SwiGLU MLP. Qwen2 has
biases on q, k and v; Qwen3 has none, and normalises q and k over each head. The layers are one
`DecoderLayer` whose arrays carry a leading L axis; training and prefill scan over it, so compile
time does not grow with depth.

Norms, softmax and rotary angles are computed in float32 whatever the compute type.

Shapes: B batch, Q query positions, S key positions, D hidden, F MLP width, H heads, K KV heads,
G = H / K query heads per KV head, N head size, V vocabulary, L layers.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from ppo_jax.mesh import gather
from ppo_jax.models.attention import KeyValue, Sequences, attend, sequences, written
from ppo_jax.models.config import DecoderConfig
from ppo_jax.models.linear import INITIALIZER_STD, PRODUCT, Linear
from ppo_jax.models.operations import broadcast, embed, swiglu
from ppo_jax.models.rope import Rotary, rotary_angles, rotate


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + ε) · w, normalised in float32."""

    def __init__(self, size: int, eps: float, *, param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((size,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * broadcast(self.weight[...], x.shape, x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: G query heads share each KV head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        def linear(in_size: int, out_size: int, bias: bool) -> Linear:
            return Linear(in_size, out_size, bias=bias, rngs=rngs, param_dtype=param_dtype)

        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query_size, bias=config.has_qkv_bias)
        self.k_proj = linear(config.hidden_size, key_size, bias=config.has_qkv_bias)
        self.v_proj = linear(config.hidden_size, key_size, bias=config.has_qkv_bias)
        self.o_proj = linear(query_size, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=param_dtype)
            if config.has_qk_norm
            else None
            for _ in range(2)
        )
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        rotary: Rotary,
        seen: Bool[Array, "B Q S"] | Sequences,
        past: KeyValue | None = None,
        slot: Int[Array, ""] | Int[Array, "B"] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], KeyValue]:
        """Attend to this call's keys or, given `past`, to `past` with them written from `slot` on.

        Args:
            slot: one for all rows, or one a row; then what is out of range is left out.
        """
        query, key = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotary), rotate(key, rotary)
        key_value = KeyValue(key, self._heads(self.v_proj(x)))
        if past is not None:
            key_value = KeyValue(
                *(
                    written(old, new.astype(old.dtype), slot)
                    for old, new in zip(past, key_value, strict=True)
                )
            )
        mixed = attend(query, key_value, seen)
        return self.o_proj(jnp.swapaxes(mixed, 1, 2).reshape(*x.shape[:2], -1)), key_value

    def _heads(self, x: Float[Array, "B Q HN"]) -> Float[Array, "B heads Q N"]:
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.head_dim), 1, 2)


class MLP(nnx.Module):
    """SwiGLU: W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        def linear(in_size: int, out_size: int) -> Linear:
            return Linear(in_size, out_size, bias=False, rngs=rngs, param_dtype=param_dtype)

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.input_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype
        )
        self.self_attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype
        )
        self.mlp = MLP(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        rotary: Rotary,
        seen: Bool[Array, "B Q S"] | Sequences,
        past: KeyValue | None = None,
        slot: Int[Array, ""] | Int[Array, "B"] | int = 0,
    ) -> tuple[Float[Array, "B Q D"], KeyValue]:
        attended, key_value = self.self_attn(self.input_layernorm(x), rotary, seen, past, slot)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), key_value


class Decoder(nnx.Module):
    """The backbone: embeddings, L layers, final norm, and the output projection if untied.

    Args:
        dtype: the compute type of activations and matrix products.
        param_dtype: the type the parameters are kept in.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        def table() -> nnx.Param[Array]:
            shape = (config.vocab_size, config.hidden_size)
            return nnx.Param(INITIALIZER_STD * jax.random.normal(rngs.params(), shape, param_dtype))

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, rngs=rngs, param_dtype=param_dtype)

        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = table()
        self.lower_layers: DecoderLayer | None = nnx.data(None)  # see `split_layers`
        self.layers = stacked_layers(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.lm_head = None if config.tie_word_embeddings else table()

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Int[Array, "B S"] | Bool[Array, "B S"] | Int[Array, "B"],
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "B S D"], KeyValue]:
        """Hidden states after the final norm, and every layer's keys and values ([L, B, K, S, N]).

        States of real tokens do not depend on the padding. The backward pass keeps what weights
        were multiplied into and recomputes the rest, attention included, which takes less memory
        and time than keeping all; with `remat` it recomputes all.

        Args:
            attention_mask: 0 at padding. Several sequences may share a row, numbered 1, 2, ...: a
                token sees those before it that have its number, and its position is their count.
                Or the lengths of rows that hold a sequence each, padded on the right.
        """
        seen = sequences(attention_mask, input_ids.shape[1])
        positions = jnp.maximum(seen.mask.sum(-1) - 1, 0)
        rotary = rotary_angles(positions, self.config)

        def apply_layer(
            graphdef: nnx.GraphDef[DecoderLayer], x: Array, layer: nnx.State[str, Any]
        ) -> tuple[Array, KeyValue]:
            return nnx.merge(graphdef, gather(layer, self.dtype))(x, rotary, seen)

        policy = None if remat else jax.checkpoint_policies.save_only_these_names(PRODUCT)
        x, key_values = self.embed(input_ids), []
        for graphdef, stack in self._stacks():
            layer = jax.checkpoint(partial(apply_layer, graphdef), prevent_cse=False, policy=policy)
            x, key_value = jax.lax.scan(layer, x, stack)
            key_values.append(key_value)
        together: KeyValue = jax.tree.map(lambda *parts: jnp.concatenate(parts), *key_values)
        return self.norm(x), together

    def split_layers(self, count: int) -> None:
        """Keep the lowest `count` layers in a stack of their own, `lower_layers`.

        Then they can be left out where gradients are taken: nothing is kept for a backward pass
        through them, and none is made.
        """
        graphdef, layers = nnx.split(self.layers)
        self.lower_layers = nnx.merge(graphdef, jax.tree.map(lambda x: x[:count], layers))
        self.layers = nnx.merge(graphdef, jax.tree.map(lambda x: x[count:], layers))

    def join_layers(self) -> None:
        """Undo `split_layers`."""
        graphdef = nnx.graphdef(self.layers)
        stacks = [stack for _, stack in self._stacks()]
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
        self.lower_layers, self.layers = None, nnx.merge(graphdef, joined)

    def _stacks(self) -> list[tuple[nnx.GraphDef[DecoderLayer], nnx.State[str, Any]]]:
        return [nnx.split(x) for x in (self.lower_layers, self.layers) if x is not None]

    def unstacked_layers(self) -> list[DecoderLayer]:
        """The L layers apart, for a decode loop: sliced, merged with their adapters and laid out
        once, not at every token."""
        unstacked = [
            nnx.merge(graphdef, gather(jax.tree.map(lambda array, index=i: array[index], stack)))
            for graphdef, stack in self._stacks()
            for i in range(len(jax.tree.leaves(stack)[0]))
        ]
        for _, module in nnx.iter_graph(unstacked):
            if isinstance(module, Linear):
                module.transpose()
                module.merge_adapter()
        return unstacked

    def embed(self, input_ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the embedding table, in the compute type."""
        return embed(self.embed_tokens[...], input_ids, self.dtype)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The output projection: the embedding table itself where the two are tied."""
        table = self.embed_tokens if self.lm_head is None else self.lm_head
        return table[...]


def project(
    hidden: Float[Array, "*batch D"], projection: Float[Array, "V D"]
) -> Float[Array, "*batch V"]:
    """float32 logits of the tokens that follow, multiplied in the type of the hidden states."""
    projection = projection.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, projection, preferred_element_type=jnp.float32)


def last_hidden(hidden: Float[Array, "B S D"], length: Int[Array, "B"]) -> Float[Array, "B D"]:
    """The hidden state of each sequence's last token, in rows padded on the right."""
    return jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
