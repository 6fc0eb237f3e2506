"""Rotary positions (RoPE, arXiv:2104.09864) in the rotate-halves form, and their scalings.

At position p, numbers i and i + N/2 of a head of size N are turned by the angle p · f_i, with the
inverse frequency f_i = theta^(-2i/N). A scaling makes some of the f_i smaller, so that more
positions are told apart than the model was first trained on.

Inverse frequencies are computed by NumPy in float32, in transformers' order: a last bit of one is
6e-3 of an angle at position 100,000.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppo_jax.models.config import DecoderConfig, Llama3Scaling, YarnScaling


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles at each query position, in float32.

    Both are multiplied by YaRN's attention factor where there is one.
    """

    cos: Float[Array, "B Q N"]
    sin: Float[Array, "B Q N"]


def rotary_angles(positions: Int[Array, "B Q"], config: DecoderConfig) -> Rotary:
    """What `rotate` turns queries and keys at these positions by."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)
    factor = attention_factor(config)
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: Float[Array, "B heads Q N"], rotary: Rotary) -> Float[Array, "B heads Q N"]:
    """Queries or keys turned by the angles of their positions, computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    return (x * cos + rotated * sin).astype(x.dtype)


def inverse_frequencies(config: DecoderConfig) -> Float[np.ndarray, "half"]:
    """The angle from one position to the next in each of a head's N/2 pairs, in float32."""
    size = config.head_dim
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    wavelengths = np.float32(config.rope_theta) ** exponents  # over 2π
    match config.rope_scaling:
        case None:
            return 1 / wavelengths
        case Llama3Scaling() as scaling:
            return _llama3(1 / wavelengths, scaling)
        case YarnScaling() as scaling:
            return _yarn(wavelengths, scaling, config)


def attention_factor(config: DecoderConfig) -> float:
    """What cosines and sines are multiplied by: 1, except with YaRN (equation 22)."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """As Llama 3.1's code has it (`apply_scaling` of its model.py)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    turns = scaling.original_max_position_embeddings / wavelength
    share = np.clip((turns - low) / (high - low), 0, 1)
    scaled: np.ndarray = (1 - share) * plain / scaling.factor + share * plain
    return scaled


def _yarn(wavelengths: np.ndarray, scaling: YarnScaling, config: DecoderConfig) -> np.ndarray:
    """Equations 17, 18 and 20 of the paper, the ramp over dimensions as in its code."""
    size = config.head_dim

    def dimension(turns: float) -> float:
        """That whose angle turns so many times over the original positions."""
        original = scaling.original_max_position_embeddings
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / width, 0, 1)
    share = 1 - ramp  # of the plain frequency
    scaled: np.ndarray = (1 - share) / (scaling.factor * wavelengths) + share / wavelengths
    return scaled
