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

from ppo_jax.algorithm import Bins
from ppo_jax.models import (
    load_critic,
    load_pretrained,
    save_pretrained,
    with_separate_critic,
    with_value_bins,
)
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


class TestAsWhatACriticBeginsAs:
    @pytest.mark.parametrize("kind", ["ForCausalLM", "ForSequenceClassification"])
    def test_of_a_reward_model_the_score_is_the_value(
        self, kind, torch_model, outputs, ragged, model_folder, tmp_path
    ):
        """transformers' own, at every position of a row, whatever the file still holds."""
        theirs = torch_model("Qwen2ForSequenceClassification", num_labels=1)
        theirs.save_pretrained(tmp_path / "reward")
        if kind == "ForCausalLM":  # whose output projection may still be there
            path = tmp_path / "reward" / "model.safetensors"
            save_file(load_file(path) | {"lm_head.weight": np.ones((96, 32), np.float32)}, path)
        ids, mask = ragged()
        with torch.no_grad():
            hidden = theirs.model(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
            expected = theirs.score(hidden)[..., 0].numpy()
        policy = load_pretrained(model_folder)
        before = outputs(policy, ids, mask)[0]
        network = with_separate_critic(policy, load_critic(tmp_path / "reward"))
        logits, values = outputs(network, ids, mask)
        np.testing.assert_allclose(values[mask], expected[mask], rtol=0, atol=1e-5)
        assert np.std(expected[mask]) > 0.1
        np.testing.assert_array_equal(logits, before)

    def test_of_a_saved_policy_its_critic_is_taken(self, network, folder, model_folder):
        """And takes the place of one that is there, its head too."""
        other = with_separate_critic(load_pretrained(model_folder))
        again = with_separate_critic(other, load_critic(folder))
        assert other.critic is not again.critic
        chex.assert_trees_all_equal(nnx.state(again), nnx.state(network))

    def test_of_a_critic_that_shares_its_backbone(self, model_folder, tmp_path):
        policy = load_pretrained(model_folder)
        policy.value_head.weight[...] = jnp.arange(32.0)[None] / 32
        save_pretrained(policy, tmp_path / "shared")
        critic = load_critic(tmp_path / "shared")
        chex.assert_trees_all_equal(nnx.state(critic.backbone), nnx.state(policy.backbone))
        chex.assert_trees_all_equal(nnx.state(critic.value_head), nnx.state(policy.value_head))

    def test_a_language_model_is_neither(self, model_folder):
        with pytest.raises(UsageError, match=r"without a value head, so neither a reward model"):
            load_critic(model_folder)

    def test_of_another_size(self, network, torch_model, tmp_path):
        theirs = torch_model("Qwen2ForSequenceClassification", num_labels=1, num_hidden_layers=2)
        theirs.save_pretrained(tmp_path / "small")
        with pytest.raises(UsageError, match=r"critic's num_hidden_layers is 2, and the policy's"):
            with_separate_critic(network, load_critic(tmp_path / "small"))


class TestOfAHistogram:
    BINS = Bins(-0.1, 2.3, 7)

    def test_round_trip(self, model_folder, outputs, ragged, tmp_path):
        network = with_value_bins(load_pretrained(model_folder), self.BINS)
        network.value_head.weight[...] = jnp.linspace(-1, 1, 7 * 32).reshape(7, 32)
        network.value_head.bias[...] = jnp.linspace(0, 1, 7)
        save_pretrained(network, tmp_path / "saved")
        again = load_pretrained(tmp_path / "saved")
        assert again.value_head.bins == self.BINS
        chex.assert_trees_all_equal(nnx.state(again), nnx.state(network))
        assert with_value_bins(again, self.BINS) is again

        ids, mask = ragged()
        _, values = outputs(again, ids, mask)
        hidden, _ = network.backbone(ids, mask)
        logits = np.asarray(hidden) @ np.linspace(-1, 1, 7 * 32).reshape(7, 32).T
        p = torch.softmax(torch.tensor(logits + np.linspace(0, 1, 7)), -1).numpy()
        edges = np.linspace(-0.1, 2.3, 8)
        np.testing.assert_allclose(values, p @ (edges[1:] + edges[:-1]) / 2, atol=1e-5)

        as_critic = with_separate_critic(
            load_pretrained(model_folder), load_critic(tmp_path / "saved")
        )
        assert as_critic.value_head.bins == self.BINS

    def test_it_begins_in_the_middle(self, model_folder, outputs, ragged):
        network = with_value_bins(load_pretrained(model_folder), self.BINS)
        np.testing.assert_allclose(outputs(network, *ragged())[1], 1.1, rtol=1e-6)

    def test_of_other_bins(self, model_folder, tmp_path):
        save_pretrained(with_value_bins(load_pretrained(model_folder), self.BINS), tmp_path / "s")
        network = load_pretrained(tmp_path / "s")
        for bins in (None, Bins(-0.1, 2.3, 9)):
            with pytest.raises(UsageError, match=r"has 7 bins from -0\.1 to 2\.3, which does not"):
                with_value_bins(network, bins)
