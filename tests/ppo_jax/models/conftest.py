"""Small random models of transformers' PyTorch, the independent source of these tests."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_torch_model(name: str = "Qwen2ForCausalLM", **overrides: Any) -> Any:
    """A random model whose biases, norms and attention patterns are all far from trivial."""
    kind = getattr(transformers, name)
    config = kind.config_class(**(SIZES | overrides))
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="session")
def torch_model() -> Callable[..., Any]:
    return make_torch_model


@pytest.fixture
def model_folder(torch_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A small Qwen2 as transformers saves it."""
    torch_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def torch_logits() -> Callable[..., np.ndarray]:
    def logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """[B, S, V]; positions count the real tokens."""
        positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
        with torch.no_grad():
            out = model(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions),
            )
        return out.logits.float().numpy()

    return logits


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef: Any, state: Any, *arrays: Any) -> Any:
    return nnx.merge(graphdef, state)(*arrays)


@pytest.fixture(scope="session")
def outputs() -> Callable[..., Any]:
    def call(module: Any, *arrays: np.ndarray) -> Any:
        """What `module(*arrays)` returns, as NumPy arrays; compiled once an architecture."""
        return jax.tree.map(np.asarray, _apply(*nnx.split(module), *arrays))

    return call


@pytest.fixture(scope="session")
def ragged() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def batch(side: str = "right", lengths: tuple[int, ...] = (11, 1, 7, 4)) -> Any:
        """Random ids [B, S] and a bool mask: rows of different lengths, padded on one side."""
        ids = np.random.default_rng(3).integers(1, SIZES["vocab_size"], (len(lengths), 11))
        mask = np.arange(11) < np.array(lengths)[:, None]
        return ids, mask if side == "right" else mask[:, ::-1].copy()

    return batch
