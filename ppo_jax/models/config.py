"""The architecture of a decoder, as numbers."""

import reprlib
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from qwen_env.errors import UsageError

MODEL_TYPES = ("qwen2", "qwen3", "llama")
"""Hugging Face's `model_type`s of the architectures that are computed."""

_LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 to 3.3 stretch rotary positions; errors as in `DecoderConfig`.

    Wavelengths of less than original / high positions stay, those of more than original / low
    become `factor` times as long, and those between go smoothly from the one to the other.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise UsageError(
                f"high_freq_factor is {self.high_freq_factor}; it must be greater than "
                f"low_freq_factor, which is {self.low_freq_factor}."
            )


@dataclass(frozen=True)
class YarnScaling:
    """How YaRN (arXiv:2309.00071) stretches rotary positions; errors as in `DecoderConfig`.

    Angles that turn more than `beta_fast` times over the original positions stay, those that turn
    less than `beta_slow` times grow `factor` times as slowly, with a ramp between the two.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the ramp begins and ends at whole dimensions."""
    attention_factor: float | None = None
    """What cosines and sines are multiplied by; None is 0.1 ln(factor) + 1, as in the paper."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.attention_factor is not None:
            check_number("attention_factor", self.attention_factor)


RopeScaling = Llama3Scaling | YarnScaling

ROPE_SCALINGS: dict[str, type[RopeScaling]] = {"llama3": Llama3Scaling, "yarn": YarnScaling}
"""By Hugging Face's `rope_type`."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Qwen2, a Qwen3 or a Llama, under their Hugging Face names. Hashable.

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
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.model_type not in MODEL_TYPES:
            known = f"{', '.join(MODEL_TYPES[:-1])} or {MODEL_TYPES[-1]}"
            raise UsageError(f"model_type is {reprlib.repr(self.model_type)}; it must be {known}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; rotary positions need an even number.")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise UsageError(
                f"rope_scaling is {reprlib.repr(self.rope_scaling)}; it must be a Llama3Scaling, a "
                "YarnScaling or None."
            )
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise UsageError(f"rope_theta is {self.rope_theta}; YaRN needs more than 1.")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised, each head by itself."""
        return self.model_type == "qwen3"

    @property
    def max_length(self) -> int:
        """The longest sequence that its positions are made for.

        A config to which YaRN was added, as the cards of Qwen's models say, still has the
        `max_position_embeddings` of before.
        """
        if not isinstance(self.rope_scaling, YarnScaling):
            return self.max_position_embeddings
        scaled = self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings
        return max(self.max_position_embeddings, int(scaled))

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


def _check_fields(config: DecoderConfig | RopeScaling) -> None:
    for field in fields(config):
        for kind, check in _CHECKS:
            if field.type is kind:
                check(field.name, getattr(config, field.name))
