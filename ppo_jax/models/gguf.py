"""GGUF files as a source of Hugging Face tensors: architectures `qwen2`, `qwen3` and `llama`.

Quantised tensors come out dequantised, in float32. llama.cpp interleaves the two rotary halves of
q and k in `llama` files; they are put back into halves here. The scaling of Llama 3's rotary
positions is there as a tensor of factors, of which the settings are found again.
"""

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.models.config import MODEL_TYPES, DecoderConfig, Llama3Scaling
from ppo_jax.models.config_json import config_from_json
from ppo_jax.models.rope import inverse_frequencies
from qwen_env.errors import UsageError
from qwen_env.extras import import_extra
from qwen_env.gguf_file import open_gguf

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Below, names of metadata are without the architecture's name that they begin with.
_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}
# Of qwen3 files also attention.key_length: the size of a head does not follow from the others.
_REQUIRED = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
_HEAD_SIZES = ("attention.value_length", "rope.dimension_count")
"""Sizes that llama.cpp keeps apart; here they are one with the size of a head."""

_YARN_KEYS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
"""What is read where `rope.scaling.type` is yarn."""

_ROPE_FACTORS = "rope_freqs.weight"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # A factor is a linear one unless the type says otherwise; 0 stands for 1 there.
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scale_linear": (1.0, 0.0),  # the factor's old name
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # -1 stands for what the type says
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.finetuned": (False, True),  # nothing reads it
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
    "embedding_scale": (1.0, 0.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # the interleaved halves
}
"""Metadata that may change the computation, and its values that do not. Whatever else has the
architecture's name is refused: there is little in a GGUF file that is not about the computation."""

_CHUNK = 2**19  # numbers that are dequantised together, so that they stay in the processor's cache


class GGUFTensors:
    """The tensors of a GGUF file by Hugging Face name, and its metadata as a config.

    Raises:
        UsageError: no such file, not a GGUF file, or tensors or metadata that are missing,
            malformed, or of a variant that this port does not compute.
        gymnasium.error.DependencyNotInstalled: the `gguf` package is missing.
    """

    def __init__(self, path: str | Path):
        self.where = self.config_where = str(path)
        file = open_gguf(path)
        tensors = {tensor.name: tensor for tensor in file.tensors}
        self.config = _read_config(_Metadata(file.fields, self.where), tensors)
        if self.config.model_type == "llama" and _ROPE_FACTORS in tensors:
            factors = np.asarray(tensors.pop(_ROPE_FACTORS).data)
            self.config = _with_llama3_scaling(self.config, factors, self.where)
        self._gguf: Any = import_extra("gguf", package="gguf")
        self._tensors = {_huggingface_name(name, self.where): t for name, t in tensors.items()}
        self.shapes = {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, out: np.ndarray) -> None:
        """Fill `out`, a contiguous array of the tensor's shape, in its own type."""
        tensor, heads = self._tensors[name], self._interleaved_heads(name)
        in_order = np.empty(out.shape, np.float32) if heads else out
        flat, done = in_order.reshape(-1), 0
        for numbers in self._dequantized(tensor):
            flat[done : done + numbers.size] = numbers
            done += numbers.size
        if heads:
            out[...] = _halves_from_pairs(in_order, heads)

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors are stored alike, to the last bit."""
        a, b = self._tensors[first], self._tensors[second]
        return a.tensor_type == b.tensor_type and np.array_equal(a.data, b.data)

    def _dequantized(self, tensor: Any) -> Iterator[np.ndarray]:
        """The numbers of a tensor in float32, a piece at a time."""
        numbers, size = self._gguf.GGML_QUANT_SIZES[tensor.tensor_type]  # of a block; in bytes
        blocks = np.asarray(tensor.data).reshape(-1).view(np.uint8).reshape(-1, size)
        step = max(_CHUNK // numbers, 1)
        for start in range(0, len(blocks), step):
            # As one row: the gguf package takes rows 16 at a time.
            row = blocks[start : start + step].reshape(1, -1)
            try:
                yield self._gguf.dequantize(row, tensor.tensor_type).reshape(-1)
            except NotImplementedError as error:
                raise UsageError(
                    f"{self.where}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, "
                    "which the gguf package cannot dequantise; requantise the file, to Q8_0 for "
                    "example."
                ) from error

    def _interleaved_heads(self, name: str) -> int:
        """How many heads' rotary halves are interleaved in that tensor; 0 where none are."""
        if self.config.model_type == "llama":
            if "q_proj" in name:
                return self.config.num_attention_heads
            if "k_proj" in name:
                return self.config.num_key_value_heads
        return 0


class _Metadata:
    """The metadata of a file, by name."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self._fields = fields
        self.names = fields.keys()
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, or `default`, if there is one."""
        field = self._fields.get(name)
        value = default if field is None else field.contents()
        if value is None:
            raise UsageError(f"{self.where} has no metadata field {name}.")
        return value


def _read_config(metadata: _Metadata, tensors: Mapping[str, Any]) -> DecoderConfig:
    where = metadata.where
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UsageError(
            f"{where} holds no model (its general.type is {reprlib.repr(kind)}); name the file of "
            "a whole model."
        )
    architecture = metadata.get("general.architecture")
    # It does not say whether output projection and embeddings are tied: unless they differ.
    content = {"model_type": architecture, "tie_word_embeddings": True}
    if architecture in MODEL_TYPES:
        table = tensors.get("token_embd.weight")
        if table is None:
            raise UsageError(f"{where}: tensor token_embd.weight is missing from the weights.")
        content["vocab_size"] = next(iter(_shape(table)), 0)
        content |= _config_keys(metadata, architecture)
    config = config_from_json(content, where)
    for name in _HEAD_SIZES:
        size = metadata.get(f"{architecture}.{name}", config.head_dim)
        if size != config.head_dim:
            raise UsageError(
                f"{where}: {architecture}.{name} is {reprlib.repr(size)}; this port computes only "
                f"heads that are of one size, here {config.head_dim}."
            )
    return config


def _with_llama3_scaling(config: DecoderConfig, factors: np.ndarray, where: str) -> DecoderConfig:
    """The config whose inverse frequencies are the plain ones divided by `factors`.

    Llama 3.1 to 3.3 are scaled alike, but for the factor of the longest wavelengths.
    """
    is_possible = factors.dtype == np.float32 and factors.shape == (config.head_dim // 2,)
    if is_possible and config.rope_scaling is None and 0 < factors.max() < np.inf:
        scaling = Llama3Scaling(
            factor=float(factors.max()),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        expected = inverse_frequencies(config) / inverse_frequencies(scaled)
        if np.allclose(factors, expected, rtol=1e-5, atol=0):
            return scaled
    raise UsageError(
        f"{where}: tensor {_ROPE_FACTORS} scales rotary positions in another way than Llama 3.1; "
        "take the model as a folder in Hugging Face layout, which says how."
    )


def _config_keys(metadata: _Metadata, architecture: str) -> dict[str, Any]:
    """What of a `config.json` the metadata says; the rest of it must change nothing."""
    prefix = f"{architecture}."
    is_yarn = metadata.get(f"{prefix}rope.scaling.type", "none") == "yarn"
    read_names = {*_CONFIG_KEYS, *_HEAD_SIZES, *(_YARN_KEYS if is_yarn else ())}
    for field in metadata.names:
        name = field.removeprefix(prefix)
        if name == field or name in read_names:
            continue
        value, neutral = metadata.get(field), _NEUTRAL.get(name)
        if neutral is None or value not in neutral:
            only = f"only {neutral[0]!r}" if neutral else "nothing of that name"
            raise UsageError(
                f"{metadata.where}: {field!a} is {reprlib.repr(value)}; this port computes {only}."
            )
    required = [*_REQUIRED, *(["attention.key_length"] if architecture == "qwen3" else [])]

    def read(keys: Mapping[str, str]) -> dict[str, Any]:
        return {
            key: metadata.get(prefix + name)
            for name, key in keys.items()
            if name in required or prefix + name in metadata.names
        }

    scaling = {"factor": 1.0} | read(_YARN_KEYS) if is_yarn else {}
    return read(_CONFIG_KEYS) | {"rope_scaling": scaling}


def _huggingface_name(name: str, where: str) -> str:
    match name.split("."):
        case ["blk", layer, module, kind] if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    if name not in _NAMES:
        raise UsageError(
            f"{where}: tensor {name!a} belongs to a variant that this port does not compute; take "
            "a file of another model."
        )
    return _NAMES[name]


def _shape(tensor: Any) -> tuple[int, ...]:
    """As NumPy counts: the longest step first."""
    return tuple(reversed(tensor.shape.tolist()))


def _halves_from_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (x0, y0, x1, y1, ...) of each head to (x0, x1, ..., y0, y1, ...)."""
    out_size, *rest = array.shape
    paired = array.reshape(heads, out_size // heads // 2, 2, *rest)
    return paired.swapaxes(1, 2).reshape(array.shape)
