"""A separate critic in a model's folder: beside the policy, and out of the way of others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from ppo_jax.models import load_pretrained, save_pretrained, with_separate_critic
from qwen_env.errors import UsageError


@pytest.fixture
def network(model_folder):
    network = with_separate_critic(load_pretrained(model_folder))
    state = nnx.state(network.critic)
    nnx.update(network.critic, jax.tree.map(lambda x: x + 0.25, state))
    network.value_head.weight[...] = jnp.arange(32.0)[None] / 32
    return network


@pytest.fixture
def folder(network, tmp_path):
    save_pretrained(network, tmp_path / "saved")
    return tmp_path / "saved"


def test_round_trip(network, folder):
    again = load_pretrained(folder)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(network))
    assert again.critic is not None
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        "config.json",
        "model.safetensors",
        "critic/value_head.safetensors",
        "critic/model.safetensors",
    }


def test_where_it_was_before(network, folder):
    """Folders of version 0.1.0 have both beside the model."""
    (folder / "critic" / "model.safetensors").rename(folder / "critic.safetensors")
    (folder / "critic" / "value_head.safetensors").rename(folder / "value_head.safetensors")
    chex.assert_trees_all_equal(nnx.state(load_pretrained(folder)), nnx.state(network))


def test_transformers_sees_the_policy_alone(network, folder, model_folder):
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter, before.get_parameter(name), rtol=0, atol=0)
    # Under transformers' own names: a backbone that it could load.
    critic = load_file(folder / "critic" / "model.safetensors")
    assert critic.keys() == {n for n, _ in theirs.named_parameters() if n != "lm_head.weight"}


def test_of_a_policy_with_an_output_projection(torch_model, tmp_path):
    torch_model(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    network = with_separate_critic(load_pretrained(tmp_path / "untied"))
    save_pretrained(network, tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "critic" / "model.safetensors")
    again = load_pretrained(tmp_path / "saved")
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(network))


def test_a_policy_without_one_leaves_none_behind(folder, model_folder):
    save_pretrained(load_pretrained(model_folder), folder)
    assert not (folder / "critic" / "model.safetensors").exists()
    assert load_pretrained(folder).critic is None


def test_of_another_model(folder):
    path = folder / "critic" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": np.zeros(31, np.float32)}, path)
    with pytest.raises(UsageError, match=r"critic.model.norm.weight has shape \(31,\), but"):
        load_pretrained(folder)
    tensors.pop("model.norm.weight")
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"tensor critic.model.norm.weight is missing"):
        load_pretrained(folder)


def test_cut_short(folder):
    path = folder / "critic" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UsageError, match=r"critic/model.safetensors is not a readable"):
        load_pretrained(folder)
