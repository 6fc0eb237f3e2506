"""A linear layer, and the low-rank adapter that it may have.

Weights are stored `[out, in]`, as Hugging Face stores them and as XLA:CPU multiplies them fastest.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float

from ppo_jax.models.operations import broadcast

INITIALIZER_STD = 0.02
PRODUCT = "product"
"""What a linear layer multiplied, as a checkpoint's policy calls it."""


class Linear(nnx.Module):
    """y = x Wᵀ (+ b), with W stored `[out, in]`, or `[in, out]` after `transpose`."""

    def __init__(
        self, in_size: int, out_size: int, *, bias: bool, rngs: nnx.Rngs, param_dtype: DTypeLike
    ):
        shape = (out_size, in_size)
        self.weight = nnx.Param(
            INITIALIZER_STD * jax.random.normal(rngs.params(), shape, param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros((out_size,), param_dtype)) if bias else None
        self.adapter: Adapter | None = nnx.data(None)
        self.is_transposed = False

    def transpose(self) -> None:
        """Lay W out for products with few rows, which XLA:CPU then computes twice as fast."""
        self.weight = nnx.Param(self.weight[...].T)
        self.is_transposed = True

    def merge_adapter(self) -> None:
        """Put the adapter, if there is one, into W."""
        if self.adapter is not None:
            weight = self.weight[...]
            product = self.adapter.product(weight.dtype, self.is_transposed)
            merged = weight.astype(jnp.float32) + product
            self.weight, self.adapter = nnx.Param(merged.astype(weight.dtype)), None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        equation = "...i,io->...o" if self.is_transposed else "...i,oi->...o"
        y: Array = jnp.einsum(equation, x, self.weight[...].astype(x.dtype))
        if self.adapter is not None:
            y = y + self.adapter(x)
        y = checkpoint_name(y, PRODUCT)
        return y if self.bias is None else y + broadcast(self.bias[...], y.shape, y.dtype)


class Adapter(nnx.Module):
    """s B A, which is added to W: LoRA (arXiv:2106.09685). At first, B is zero.

    Args:
        lora_A: float32 `[*layers, rank, in]`.
        lora_B: float32 `[*layers, out, rank]`.
        scale: s, α over the rank.
    """

    def __init__(
        self,
        lora_A: Float[Array, "*layers rank in"],
        lora_B: Float[Array, "*layers out rank"],
        scale: float,
    ):
        self.lora_A, self.lora_B = nnx.Param(lora_A), nnx.Param(lora_B)
        self.scale = scale

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """s (x Aᵀ) Bᵀ: the products of the rank's width are the only ones whose weights learn."""
        down = jnp.einsum("...i,ri->...r", x, self.lora_A[...].astype(x.dtype))
        return self.scale * jnp.einsum("...r,or->...o", down, self.lora_B[...].astype(x.dtype))

    def product(
        self, dtype: DTypeLike, is_transposed: bool = False
    ) -> Float[Array, "*layers out in"] | Float[Array, "*layers in out"]:
        """float32 s B A, multiplied in `dtype`, or its transpose: laid out as W is, so that what is
        added needs no more room than the sum."""
        a, b = self.lora_A[...].astype(dtype), self.lora_B[...].astype(dtype)
        equation = "...or,...ri->...io" if is_transposed else "...or,...ri->...oi"
        return self.scale * jnp.einsum(equation, b, a, preferred_element_type=jnp.float32)
