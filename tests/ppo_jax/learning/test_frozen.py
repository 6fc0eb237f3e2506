"""What never learns, kept apart from what does."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from ppo_jax.config import OptimizerConfig
from ppo_jax.learning.frozen import NOTHING, join, partition
from ppo_jax.models import with_separate_critic


def names(params):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}


def config(**changes):
    return OptimizerConfig(learning_rate=1e-3, **changes)


def test_by_default_everything_learns(network):
    graphdef, params, frozen = partition(network, config())
    assert frozen == NOTHING
    assert graphdef == nnx.graphdef(network)
    chex.assert_trees_all_equal(params, nnx.state(network))


def test_frozen_embeddings_take_the_tied_projection_with_them(network, make_network):
    everything = names(nnx.state(network))
    _, params, frozen = partition(network, config(freeze_embeddings=True))
    assert names(frozen) == {"backbone.embed_tokens"} == everything - names(params)
    untied = make_network(tie_word_embeddings=False)
    _, params, frozen = partition(untied, config(freeze_embeddings=True))
    assert names(frozen) == {"backbone.embed_tokens"}
    assert "backbone.lm_head" in names(params)


def test_the_lowest_layers_are_frozen_first(network):
    _, params, frozen = partition(network, config(num_frozen_layers=1))
    whole = nnx.state(network)["backbone"]
    for part, layers in (
        (slice(1), frozen["backbone"]["lower_layers"]),
        (slice(1, None), params["backbone"]["layers"]),
    ):
        expected = jax.tree.map(lambda x, part=part: x[part], whole["layers"])
        chex.assert_trees_all_equal(layers, expected)
    assert names(params) == names(nnx.state(network))
    assert network.backbone.lower_layers is None  # the caller's own is as it was


def test_all_layers_may_be_frozen(network):
    _, params, frozen = partition(network, config(num_frozen_layers=2))
    chex.assert_trees_all_equal(
        frozen["backbone"]["layers"], nnx.state(network)["backbone"]["layers"]
    )
    assert names(params) == {
        "backbone.embed_tokens",
        "backbone.norm.weight",
        "value_head.weight",
        "value_head.bias",
    }


def test_a_separate_critic_is_not_frozen(make_network):
    network = with_separate_critic(make_network())
    settings = config(num_frozen_layers=2, freeze_embeddings=True)
    _, params, frozen = partition(network, settings)
    critic = {name for name in names(nnx.state(network)) if name.startswith("critic.")}
    assert critic <= names(params)
    assert {name.split(".")[1] for name in names(frozen)} == {"layers", "embed_tokens"}


@pytest.mark.parametrize("count", [2, 4])
def test_joined_they_are_the_network_again(make_network, count):
    network = make_network(num_hidden_layers=4)
    settings = config(num_frozen_layers=count, freeze_embeddings=True)
    graphdef, params, frozen = partition(network, settings)
    same = nnx.merge(graphdef, join(params, frozen))
    tokens = np.arange(12).reshape(2, 6)
    mask = np.arange(6) < np.array([[6], [4]])
    chex.assert_trees_all_equal(*(jax.jit(n)(tokens, mask) for n in (same, network)))
    if count < 4:
        same.backbone.join_layers()
    assert nnx.graphdef(same) == nnx.graphdef(network)
    chex.assert_trees_all_equal(nnx.state(same), nnx.state(network))
