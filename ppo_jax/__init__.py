"""PPO for Qwen2 language models, in JAX and Flax."""

import os
from importlib.metadata import version

import jax

# These releases of jaxlib compute some fused reductions wrongly on a CPU, in silence
# (https://github.com/jax-ml/jax/issues/39103); without that fusion they are right. XLA reads the
# variable when the first program is compiled.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if version("jaxlib") in ("0.10.2", "0.11.0") and _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=-reduce".strip()

# Unless told otherwise, JAX rounds what is multiplied in float32 to TF32 on a GPU, to bfloat16 on a
# TPU. Here float32 means float32, in the value head too; products in bfloat16 are what they were.
if jax.config.values["jax_default_matmul_precision"] is None:
    jax.config.update("jax_default_matmul_precision", "highest")
