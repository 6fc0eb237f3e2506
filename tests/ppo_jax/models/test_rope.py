"""Inverse frequencies against transformers', with the numbers of published models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ppo_jax.models import DecoderConfig, Llama3Scaling, YarnScaling
from ppo_jax.models.config_json import config_from_json
from ppo_jax.models.rope import attention_factor, inverse_frequencies, rotary_angles
from qwen_env.errors import UsageError

SIZES = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 1}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32768}
SETTINGS = {
    "Llama 3.1": LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
    "Llama 3.2": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    "Qwen2.5": YARN | {"factor": 4.0},
    "a factor of 1": YARN | {"factor": 1.0},
    "a ramp without width": YARN | {"factor": 3, "beta_fast": 9, "beta_slow": 9, "truncate": False},
    "few positions": YARN | {"factor": 2.5, "original_max_position_embeddings": 3},
    "all set": YARN
    | {"factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5},
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("size", [20, 64, 128])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_they_are_those_of_transformers(settings, size, theta):
    theirs = LlamaConfig(
        **SIZES,
        num_attention_heads=1,
        head_dim=size,
        rope_parameters=settings | {"rope_theta": theta},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](theirs)
    config = config_from_json(theirs.to_dict())
    found = inverse_frequencies(config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=4e-7)
    assert attention_factor(config) == factor


def test_far_angles_are_those_of_transformers():
    """At the last positions of Llama 3.2, to a last bit or two of the inverse frequencies."""
    settings = SETTINGS["Llama 3.2"] | {"rope_theta": 500_000.0}
    theirs = LlamaConfig(**SIZES, num_attention_heads=1, head_dim=64, rope_parameters=settings)
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs)
    positions = np.arange(131_000, 131_072)[None]
    angles = torch.tensor(positions)[..., None].float() * inverse
    cos, sin = rotary_angles(positions, config_from_json(theirs.to_dict()))
    for ours, expected in ((cos, angles.cos()), (sin, angles.sin())):
        np.testing.assert_allclose(ours[..., :32], expected, rtol=0, atol=131_072 * 2**-23)
        np.testing.assert_array_equal(ours[..., :32], ours[..., 32:])


def test_yarn_makes_room_for_longer_sequences():
    """Qwen's cards say to add it to a config that still has the number of positions of before."""
    config = replace(DecoderConfig.qwen2_5_0_5b(), rope_scaling=YarnScaling(4.0, 32768))
    assert config.max_position_embeddings == 32_768
    assert config.max_length == 131_072
    shorter = replace(config, rope_scaling=YarnScaling(4.0, 4096))
    assert shorter.max_length == 32_768
    llama3 = replace(config, rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192))
    assert llama3.max_length == 32_768


def test_a_scaling_is_no_dict():
    with pytest.raises(UsageError, match=r"rope_scaling is \{'rope_type': 'yarn'\}; it must be a"):
        replace(DecoderConfig.qwen2_5_0_5b(), rope_scaling={"rope_type": "yarn"})
