"""The architecture of a decoder, as numbers."""

import reprlib
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from qwen_env.errors import UsageError

MODEL_TYPES = ("qwen2", "llama")
"""Hugging Face's `model_type`s of the architectures that are computed."""

_LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes of a Qwen2 or of a relative, under their Hugging Face names. Hashable.

    Raises:
        UsageError: the type is another, a size is no integer from 1 to 2³¹ - 1, a number is not
            positive or too large for float32, the heads cannot share the KV heads evenly, or the
            head size is odd.
    """

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
    model_type: str = "qwen2"

    def __post_init__(self) -> None:
        for field in fields(self):
            for kind, check in _CHECKS:
                if field.type is kind:
                    check(field.name, getattr(self, field.name))
        if self.model_type not in MODEL_TYPES:
            known = " or ".join(MODEL_TYPES)
            raise UsageError(f"model_type is {reprlib.repr(self.model_type)}; it must be {known}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; rotary positions need an even number.")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.model_type == "qwen2"

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


def check_size(name: str, value: object) -> None:
    """Raise a `UsageError` unless `value` is an integer that can be the size of an array."""
    # Python counts True as an integer.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_SIZE:
        raise UsageError(
            f"{name} is {reprlib.repr(value)}; it must be an integer from 1 to {_LARGEST_SIZE}."
        )


def check_number(name: str, value: Any) -> None:
    """Raise a `UsageError` unless `value` is a positive number that float32 can hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value <= _LARGEST_NUMBER):
        raise UsageError(f"{name} is {reprlib.repr(value)}; it must be a positive number.")


def check_flag(name: str, value: object) -> None:
    """Raise a `UsageError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {reprlib.repr(value)}; it must be true or false.")


_CHECKS = ((int, check_size), (float, check_number), (bool, check_flag))
