"""How this project's programs are compiled: `jit`, which means the same whatever JAX's flags are.

What JAX needs to be told for that belongs to our own functions. Nothing is set for the process, so
other people's programs stay as they are.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit`, of programs that mean what was written and are right on every jaxlib.

    Args:
        options: those of `jax.jit`.
    """

    @functools.wraps(function)
    def as_written(*args: Any, **kwargs: Any) -> Any:
        with (
            float32_products(),
            # Flags that people set for programs of their own, or that a reward function sets.
            jax.enable_x64(False),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            return function(*args, **kwargs)

    return jax.jit(as_written, compiler_options=compiler_options(), **options)


@contextmanager
def float32_products() -> Iterator[None]:
    """Within the block, no product of float32 is rounded, unless JAX's flags ask for it.

    By itself, JAX rounds what is multiplied in float32 to TF32 on a GPU and to bfloat16 on a TPU.
    Products of bfloat16 stay what they are. `JAX_DEFAULT_MATMUL_PRECISION`, where it is set as an
    environment variable or by `jax.config`, has its way.
    """
    if jax.config.values["jax_default_matmul_precision"] is not None:
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield


def compiler_options() -> dict[str, Any]:
    """What XLA must be told on a CPU for a program to be right, and small.

    jaxlib 0.10.2 and 0.11.0 compute some fused reductions wrongly, in silence
    (https://github.com/jax-ml/jax/issues/39103). These are their other fusions of that kind.

    XLA:CPU slices no bfloat16, so a loop over layers widens all of them to take one. Moved out of
    the loop, that would be a float32 copy of all layers; left there, it is fused with the slice.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    if version("jaxlib") in ("0.10.2", "0.11.0"):
        kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
        options["xla_cpu_experimental_ynn_fusion_type"] = kinds
    return options
