"""GGUF files as a source of Hugging Face tensors: architectures `qwen2` and `llama`.

Quantised tensors come out dequantised, in float32. llama.cpp interleaves the two rotary halves of
q and k in `llama` files; they are put back into halves here.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled

from ppo_jax.models.config import READABLE_MODEL_TYPES
from qwen_env.errors import UsageError

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GGUFFile:
    """Tensors by Hugging Face name, and `config` as a `config.json` would hold it."""

    def __init__(self, path: str | Path):
        try:
            import gguf
        except ImportError:
            raise DependencyNotInstalled(
                "Reading GGUF files needs the gguf package: pip install 'qwen-ppo-jax[gguf]'"
            ) from None
        if not Path(path).is_file():
            raise UsageError(f"{path}: no such file.")
        self.where = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise UsageError(f"{path} is not a readable GGUF file: {error}.") from error
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def config(self) -> dict[str, Any]:
        model_type = self._field("general.architecture")
        if model_type not in READABLE_MODEL_TYPES:
            return {"model_type": model_type}

        def field(name: str, default: Any = None) -> Any:
            return self._field(f"{model_type}.{name}", default)

        heads = field("attention.head_count")
        hidden_size = field("embedding_length")
        return {
            "model_type": model_type,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": hidden_size,
            "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("attention.head_count_kv", heads),
            "head_dim": field("attention.key_length", hidden_size // heads),
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_parameters": {
                "rope_theta": field("rope.freq_base", 10_000.0),
                "rope_type": field("rope.scaling.type", "default"),
            },
            "max_position_embeddings": field("context_length", 32768),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def __contains__(self, name: str) -> bool:
        return _gguf_name(name) in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[_gguf_name(name)]
        array = self._dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if self.config["model_type"] == "llama":
            if "q_proj" in name:
                array = _halves_from_pairs(array, self.config["num_attention_heads"])
            elif "k_proj" in name:
                array = _halves_from_pairs(array, self.config["num_key_value_heads"])
        return array

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        value = default if field is None else field.contents()
        if value is None:
            raise UsageError(f"{self.where} has no metadata field {name}.")
        return value


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def _halves_from_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (x0, y0, x1, y1, ...) of each head to (x0, x1, ..., y0, y1, ...)."""
    out_size, *rest = array.shape
    paired = array.reshape(heads, out_size // heads // 2, 2, *rest)
    return paired.swapaxes(1, 2).reshape(array.shape)
