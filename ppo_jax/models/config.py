"""The architecture of a Qwen2, as numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwen_env.errors import UsageError

READABLE_MODEL_TYPES = ("qwen2", "llama")
"""Hugging Face `model_type`s that this port reads. A Llama is a Qwen2 whose q/k/v biases are 0."""


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes of a Qwen2, under their Hugging Face names. Hashable."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # N
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; rotary positions need an even number.")

    @classmethod
    def qwen2_5_0_5b(cls) -> Self:
        """Qwen2.5-0.5B and Qwen2.5-0.5B-Instruct: 494 M parameters."""
        return cls(
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            head_dim=64,
        )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], where: str = "config.json") -> Self:
        """Read the contents of a `config.json`.

        Args:
            where: how messages call what was read.

        Raises:
            UsageError: another architecture, a missing field, one that is not a positive number, or
                a variant this port does not compute (scaled RoPE, sliding-window attention,
                quantised weights, ...).
        """
        model_type = config.get("model_type")
        if model_type not in READABLE_MODEL_TYPES:
            raise UsageError(
                f"{where} describes a model of type {model_type!r}; this port reads "
                f"{' and '.join(READABLE_MODEL_TYPES)} models (Qwen2.5-0.5B and its relatives)."
            )
        # transformers 5 groups the RoPE settings; before, they stood at the top level.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        settings = {**config, **rope}
        quantization = config.get("quantization_config") or {}
        for setting, found, supported in (
            ("the RoPE type", rope.get("rope_type", rope.get("type", "default")), "default"),
            ("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0), 1.0),
            ("use_sliding_window", bool(config.get("use_sliding_window", False)), False),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("mlp_bias", bool(config.get("mlp_bias", False)), False),
            ("attention_bias", bool(config.get("attention_bias", False)), False),
            ("the quantization method", quantization.get("quant_method", "none"), "none"),
        ):
            if found != supported:
                raise UsageError(
                    f"{where} sets {setting} to {found!r}; this port computes only {supported!r}."
                )

        def number(name: str, default: float | None = None) -> Any:
            value = default if settings.get(name) is None else settings[name]
            if value is None:
                raise UsageError(f"{where} has no field {name!r}, which every Qwen2 needs.")
            if not isinstance(value, int | float) or not value > 0:
                raise UsageError(f"{where} sets {name} to {value!r}; it must be a positive number.")
            return value

        def size(name: str, default: int | None = None) -> int:
            value = number(name, default)
            if not isinstance(value, int):
                raise UsageError(f"{where} sets {name} to {value!r}; it must be an integer.")
            return value

        hidden_size, heads = size("hidden_size"), size("num_attention_heads")
        fields: dict[str, Any] = {
            "vocab_size": size("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": size("intermediate_size"),
            "num_hidden_layers": size("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": size("num_key_value_heads", heads),
            "head_dim": size("head_dim", hidden_size // heads),
            "rms_norm_eps": float(number("rms_norm_eps", 1e-6)),
            "rope_theta": float(number("rope_theta", 10_000.0)),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "max_position_embeddings": size("max_position_embeddings", 32768),
        }
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def to_huggingface(self, architecture: str = "Qwen2ForCausalLM") -> dict[str, Any]:
        """The contents of a `config.json` that `transformers` loads as a Qwen2."""
        return {
            "architectures": [architecture],
            "model_type": "qwen2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
        }
