"""Attention of rows of sequences to themselves by kernels of GPUs and TPUs.

None of them writes a logit to memory, which the plain formula does in float32, five times in a
forward and a backward pass. `kernels` says which may stand for the formula; each asks for much, and
where something is missing the formula is taken.

Shapes: B batch, S positions, H heads, K KV heads, N head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Kernel = Callable[[Array, Array, Array, Array], Array]
"""Of query [B, H, S, N], key and value [B, K, S, N] and the number [B, S] of the sequence at each
position, 0 for padding: as `attention.attend` of `attention.sequences`, but for padding."""


def kernels(
    query: Float[Array, "B H S N"], key: Float[Array, "B K S N"], *, is_one_a_row: bool
) -> dict[str, Kernel]:
    """Those that can compute this attention, by the platform that a program is compiled for.

    A program for a GPU or a TPU can be made without one, as `benchmarks/compile_ahead.py` does.

    Args:
        is_one_a_row: each row holds one sequence, from its start on.
    """
    found: dict[str, Kernel] = {}
    if _suits_cudnn(query, key, is_one_a_row):
        found["cuda"] = cudnn
    if jax.default_backend() != "gpu" and _suits_splash(query):
        found["tpu"] = splash
    return found


def _suits_cudnn(query: Array, key: Array, is_one_a_row: bool) -> bool:
    """Whether cuDNN is asked for the one thing that all its versions have right.

    Sequences that share a row would have to be told apart by a mask. With one, the gradient of the
    queries becomes NaN on an H100 where S % 128 is 64 and logits are as low as some of Qwen2.5's
    (https://github.com/pytorch/pytorch/issues/196678).
    """
    if not is_one_a_row or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if jax.default_backend() == "gpu":
        device = jax.local_devices()[0]
        if "cuda" not in device.client.platform_version:
            return False
        if float(device.compute_capability) < 8:  # JAX does not check it
            return False
    try:
        jax.eval_shape(of_positions, *map(_by_position, (query, key, key)))
    except (RuntimeError, NotImplementedError, ValueError):  # no cuDNN, an old one, the head's size
        return False
    return True


def cudnn(
    query: Float[Array, "B H S N"],
    key: Float[Array, "B K S N"],
    value: Float[Array, "B K S N"],
    number: Int[Array, "B S"],
) -> Float[Array, "B H S N"]:
    """By cuDNN's flash attention. Padding, which is behind its sequence, need not be masked."""
    mixed: Array = of_positions(*(jnp.swapaxes(x, 1, 2) for x in (query, key, value)))
    return jnp.swapaxes(mixed, 1, 2)


of_positions = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
"""Of query [B, S, H, N], key and value [B, S, K, N]."""


def _by_position(x: Array) -> jax.ShapeDtypeStruct:
    batch, heads, size, head_size = x.shape
    return jax.ShapeDtypeStruct((batch, size, heads, head_size), x.dtype)


LANES = 128
"""A TPU's kernel takes a multiple of this number of positions."""


def _suits_splash(query: Array) -> bool:
    return query.dtype == jnp.bfloat16 and query.shape[2] > LANES


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def splash(
    query: Float[Array, "B H S N"],
    key: Float[Array, "B K S N"],
    value: Float[Array, "B K S N"],
    number: Int[Array, "B S"],
    interpret: bool = False,
) -> Float[Array, "B H S N"]:
    """By JAX's splash attention, which leaves out blocks of keys behind all of their queries.

    Args:
        interpret: compute on any device, slowly, what the kernel would.
    """
    return _splash_forward(query, key, value, number, interpret)[0]


def _splash_forward(
    query: Array, key: Array, value: Array, number: Array, interpret: bool
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    with jax.default_matmul_precision(_PRECISION):
        kernel = partial(_splash, number=number, interpret=interpret)
        mixed, pull_back = jax.vjp(kernel, query, key, value)
    return mixed, pull_back


def _splash_backward(
    interpret: bool, pull_back: Callable[[Array], tuple[Array, Array, Array]], cotangent: Array
) -> tuple[Array, Array, Array, None]:
    with jax.default_matmul_precision(_PRECISION):
        return *pull_back(cotangent), None


splash.defvjp(_splash_forward, _splash_backward)

_PRECISION = "default"
"""The kernel does not compile where products of float32 are to be exact (`compilation`), though it
has none: it multiplies bfloat16, and adds up in float32."""


def _splash(query: Array, key: Array, value: Array, *, number: Array, interpret: bool) -> Array:
    # Importing it takes most of a second.
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, heads, size, head_size = query.shape
    lacking = -size % LANES  # become padding
    scaled = (query.astype(jnp.float32) / head_size**0.5).astype(query.dtype)
    scaled, key, value = (
        jnp.pad(x, [(0, 0), (0, 0), (0, lacking), (0, 0)]) for x in (scaled, key, value)
    )
    number = jnp.pad(number, [(0, 0), (0, lacking)])
    padded = size + lacking
    block = max(n for n in (LANES, 2 * LANES, 4 * LANES) if padded % n == 0)
    names = (
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
        "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
    )  # fmt: skip
    blocks: dict[str, Any] = dict.fromkeys(names, block)
    causal = splash_attention.CausalMask((padded, padded))
    attend: Any = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention.BlockSizes(**blocks),
        interpret=interpret,
    )
    segments = splash_attention.SegmentIds(number, number)
    mixed: Array = jax.vmap(attend)(scaled, key, value, segments)
    return mixed[:, :, :size]
