"""GGUF files as a source of Hugging Face tensors: architectures `qwen2` and `llama`.

Quantised tensors come out dequantised, in float32. llama.cpp interleaves the two rotary halves of
q and k in `llama` files; they are put back into halves here.
"""

import math
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.models.config import READABLE_MODEL_TYPES
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
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFTensors:
    """Tensors by Hugging Face name, and `config` as a `config.json` would hold it.

    Raises:
        UsageError: no such file, not a GGUF file, or metadata missing from it.
        gymnasium.error.DependencyNotInstalled: the `gguf` package is missing.
    """

    def __init__(self, path: str | Path):
        self._reader = open_gguf(path)
        self._dequantize = import_extra("gguf", extra="gguf").dequantize
        self._tensors = {_huggingface_name(t.name): t for t in self._reader.tensors}
        self.where = self.config_where = str(path)

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    @cached_property
    def config(self) -> dict[str, Any]:
        model_type = self._field("general.architecture")
        if model_type not in READABLE_MODEL_TYPES:
            return {"model_type": model_type}
        if "model.embed_tokens.weight" not in self.names:
            raise UsageError(f"{self.where}: tensor token_embd.weight is missing from the weights.")

        def field(name: str, default: Any = None) -> Any:
            return self._field(f"{model_type}.{name}", default)

        heads = field("attention.head_count")
        hidden_size = field("embedding_length")
        head_dim = field("attention.key_length", hidden_size // heads)
        rope_type = field("rope.scaling.type", "none")
        # The scaled angles of Llama 3.1 and later are a tensor; its name is not in the metadata.
        if "rope_freqs.weight" in self.names:
            rope_type = "rope_freqs.weight"
        return {
            "model_type": model_type,
            "vocab_size": int(self._tensors["model.embed_tokens.weight"].shape[1]),
            "hidden_size": hidden_size,
            "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_parameters": {
                "rope_theta": field("rope.freq_base", 10_000.0),
                "rope_type": "default" if rope_type == "none" else rope_type,
                "partial_rotary_factor": field("rope.dimension_count", head_dim) / head_dim,
            },
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self.names,
            "max_position_embeddings": field("context_length", 32768),
            "tie_word_embeddings": "lm_head.weight" not in self.names,
        }

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        # dequantize takes 16 rows at a time; longer rows make that fewer and larger steps.
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        longer = rows.reshape(len(rows) // math.gcd(len(rows), 64), -1)
        try:
            array = self._dequantize(longer, tensor.tensor_type)
        except NotImplementedError as error:
            raise UsageError(
                f"{self.where}: tensor {tensor.name} is stored as {tensor.tensor_type.name}, which "
                "the gguf package cannot dequantise; requantise the file, to Q8_0 for example."
            ) from error
        array = array.reshape(tuple(reversed(tensor.shape.tolist())))
        if self.config["model_type"] == "llama":
            if "q_proj" in name:
                array = _halves_from_pairs(array, self.config["num_attention_heads"])
            elif "k_proj" in name:
                array = _halves_from_pairs(array, self.config["num_key_value_heads"])
        return array

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.fields.get(name)
        value = default if field is None else field.contents()
        if value is None:
            raise UsageError(f"{self.where} has no metadata field {name}.")
        return value


def _huggingface_name(name: str) -> str:
    match name.split("."):
        case ["blk", layer, module, kind] if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    return _NAMES.get(name, name)


def _halves_from_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (x0, y0, x1, y1, ...) of each head to (x0, x1, ..., y0, y1, ...)."""
    out_size, *rest = array.shape
    paired = array.reshape(heads, out_size // heads // 2, 2, *rest)
    return paired.swapaxes(1, 2).reshape(array.shape)
