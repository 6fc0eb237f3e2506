import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo_jax.models import (
    DecoderConfig,
    PolicyValueNetwork,
    RewardModel,
    load_pretrained,
    with_separate_critic,
)
from ppo_jax.models.heads import ScalarHead

CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=256,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=False,
)


def abstract(kind, **options):
    """Shapes and types alone: nothing is computed."""
    return nnx.eval_shape(lambda: kind(CONFIG, rngs=nnx.Rngs(0), **options))


@pytest.fixture(scope="module")
def reward_model():
    graphdef, _ = nnx.split(abstract(RewardModel))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(RewardModel(CONFIG, rngs=nnx.Rngs(0))))())


def test_a_scalar_head_is_a_dot_product_in_float32():
    head = ScalarHead(jnp.array([1.0, 2.0, -1.0]), bias=True)
    head.bias[...] = jnp.array([0.5])
    hidden = jnp.array([[[1.0, 1.0, 1.0], [1e-3, 256.0, 0.0]]], jnp.bfloat16)
    y = head(hidden)
    assert y.dtype == jnp.float32
    expected = np.asarray(hidden, np.float32) @ np.array([1.0, 2.0, -1.0]) + 0.5
    np.testing.assert_array_equal(y, expected.astype(np.float32))


def test_a_new_value_head_is_zero(model_folder):
    network = load_pretrained(model_folder)
    assert network.value_head.weight.shape == (1, 32)
    np.testing.assert_array_equal(network.value_head.weight[...], 0.0)
    np.testing.assert_array_equal(network.value_head.bias[...], 0.0)


def test_a_new_reward_head_is_small_and_has_no_bias(reward_model):
    weight = np.asarray(reward_model.score.weight[...])
    assert weight.shape == (1, 256)
    assert weight.std() == pytest.approx(1 / np.sqrt(257), rel=0.15)  # 256 draws: 4.4% one sigma
    assert reward_model.score.bias is None


def test_only_a_policy_has_an_output_projection():
    assert not CONFIG.tie_word_embeddings
    assert abstract(PolicyValueNetwork).backbone.lm_head is not None
    assert abstract(RewardModel).backbone.lm_head is None


class TestSeparateCritic:
    @pytest.fixture
    def network(self, model_folder):
        network = load_pretrained(model_folder)
        network.value_head.weight[...] = jnp.linspace(-1, 1, 32)[None]
        return network

    def test_begins_on_the_policys_arrays_and_says_the_same(self, network, outputs, ragged):
        assert network.critic is None
        separate = with_separate_critic(network)
        for name, before in (("logits", 0), ("values", 1)):
            np.testing.assert_array_equal(
                outputs(separate, *ragged())[before], outputs(network, *ragged())[before], name
            )
        pairs = zip(
            *(jax.tree.leaves(nnx.state(x)) for x in (separate.backbone, separate.critic)),
            strict=True,
        )
        for policys, critics in pairs:
            assert policys is critics
        assert with_separate_critic(separate) is separate

    def test_values_are_its_own_and_logits_the_policys(self, network, outputs, ragged):
        separate = with_separate_critic(network)
        ids, mask = ragged()
        logits, values = outputs(separate, ids, mask)
        weight = separate.critic.norm.weight
        weight[...] = 2 * weight[...]
        same_logits, doubled = outputs(separate, ids, mask)
        np.testing.assert_array_equal(same_logits, logits)
        np.testing.assert_allclose(doubled[mask], 2 * values[mask], rtol=1e-5, atol=1e-5)
        hidden, _ = outputs(separate.critic, ids, mask)
        expected = hidden[mask] @ np.linspace(-1, 1, 32)
        np.testing.assert_allclose(doubled[mask], expected, rtol=0, atol=1e-4)

    def test_has_no_output_projection_and_the_policys_types(self):
        half = abstract(
            PolicyValueNetwork, separate_critic=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
        )
        assert half.backbone.lm_head is not None
        assert half.critic.lm_head is None
        assert half.critic.norm.weight.dtype == jnp.bfloat16
        assert half.critic.dtype == half.backbone.dtype == jnp.bfloat16

    def test_is_made_from_a_policy_with_an_output_projection(self, torch_model, tmp_path):
        torch_model(tie_word_embeddings=False).save_pretrained(tmp_path)
        network = load_pretrained(tmp_path, dtype=jnp.bfloat16)
        separate = with_separate_critic(network)
        assert separate.backbone.lm_head is not None
        assert separate.critic.lm_head is None
        assert separate.critic.dtype == jnp.bfloat16
        assert separate.config == network.config


@pytest.mark.parametrize("kind", [PolicyValueNetwork, RewardModel])
def test_heads_stay_float32_in_a_bfloat16_network(kind):
    network = abstract(kind, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    head = network.value_head if kind is PolicyValueNetwork else network.score
    assert head.weight.dtype == jnp.float32
    assert network.backbone.norm.weight.dtype == jnp.bfloat16


def test_a_reward_reads_the_last_real_token_and_none_behind_it(reward_model, outputs):
    model = reward_model
    ids = np.random.default_rng(0).integers(0, 50, (3, 6))
    mask = np.arange(6) < np.array([[6], [4], [1]])
    scores = outputs(model, ids, mask)
    assert scores.shape == (3,)
    assert np.abs(scores).min() > 0

    hidden, _ = outputs(model.backbone, ids, mask)
    every_position = hidden @ np.asarray(model.score.weight[0])
    np.testing.assert_allclose(scores, every_position[[0, 1, 2], [5, 3, 0]], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(outputs(model, np.where(mask, ids, 7), mask), scores)
    changed = ids.copy()
    changed[1, 3] = (changed[1, 3] + 1) % 50
    np.testing.assert_array_equal(outputs(model, changed, mask) == scores, [True, False, True])
