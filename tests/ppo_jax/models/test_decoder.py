"""The port against transformers' PyTorch models, live."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from ppo_jax.generation.rollout import rollout
from ppo_jax.models import DecoderConfig, PolicyValueNetwork, load_pretrained, save_pretrained
from ppo_jax.models.config_json import config_from_json
from ppo_jax.models.rope import rotary_angles
from qwen_env import mdp

# Over 9 positions, fewer than the tests have, some angles turn often, some seldom, some between.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 1.2,
    "original_max_position_embeddings": 9,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 9,
}
RELATIVES = {
    "Qwen3": {"name": "Qwen3ForCausalLM", "head_dim": 20},
    "Llama 3.2": {"name": "LlamaForCausalLM", "head_dim": 20, "rope_parameters": LLAMA3},
    "Qwen2.5 with YaRN": {"head_dim": 20, "rope_parameters": YARN},
    "Qwen3 with a YaRN of its own": {
        "name": "Qwen3ForCausalLM",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": YARN
        | {"beta_fast": 1.2, "beta_slow": 0.2, "truncate": False, "attention_factor": 1.5},
    },
}
VARIANTS = {
    **RELATIVES,
    "tied, 2 heads a KV head": {},
    "untied, a KV head a head": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "one KV head, heads wider than D / H": {"num_key_value_heads": 1, "head_dim": 20},
    "7 heads a KV head, one layer": {
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
    },
}


@pytest.fixture
def network(model_folder):
    return load_pretrained(model_folder)


def small_config(**changes):
    config = DecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return replace(config, **changes)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_parity_with_transformers(variant, torch_model, torch_logits, outputs, ragged, tmp_path):
    theirs = torch_model(**variant)
    theirs.save_pretrained(tmp_path / "theirs")
    network = load_pretrained(tmp_path / "theirs")
    for side in ("right", "left"):
        ids, mask = ragged(side)
        logits, values = outputs(network, ids, mask)
        assert logits.dtype == values.dtype == np.float32
        expected = torch_logits(theirs, ids, mask)
        assert expected[mask].std() > 0.5  # not a comparison of noughts
        np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(values[mask], 0.0)

    # And back: what we save, transformers loads, without a word about missing weights.
    save_pretrained(network, tmp_path / "ours")
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    np.testing.assert_allclose(
        torch_logits(reloaded, ids, mask)[mask], logits[mask], rtol=0, atol=1e-5
    )
    for (name, ours), original in zip(
        reloaded.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, original), name


@pytest.mark.parametrize("variant", [{}, *RELATIVES.values()], ids=["Qwen2", *RELATIVES])
def test_transformers_generates_what_the_rollout_does(variant, torch_model, tmp_path):
    torch_model(**variant).save_pretrained(tmp_path / "model")
    network = load_pretrained(tmp_path / "model")
    save_pretrained(network, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    prompt = np.random.default_rng(0).integers(1, 96, (2, 5))
    rules = mdp.Rules(max_prompt_length=5, max_new_tokens=9, vocab_size=96, eos_token_ids=(0,))
    graphdef, state = nnx.split(network)

    @jax.jit
    def greedy_tokens(state):
        lengths = jnp.array([5, 5])
        key = jax.random.key(0)
        policy = nnx.merge(graphdef, state)
        return rollout(policy, prompt, lengths, key, rules=rules, greedy=True).state.tokens

    expected = theirs.generate(
        torch.tensor(prompt),
        attention_mask=torch.ones(2, 5, dtype=torch.int64),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=0,
    ).numpy()
    assert len(set(expected.ravel())) > 8
    np.testing.assert_array_equal(greedy_tokens(state)[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_load_save_load_is_bit_equal(param_dtype, torch_model, tmp_path):
    torch_model(tie_word_embeddings=False).save_pretrained(tmp_path / "theirs")
    first = load_pretrained(tmp_path / "theirs", param_dtype=param_dtype)
    save_pretrained(first, tmp_path / "ours")
    second = load_pretrained(tmp_path / "ours", param_dtype=param_dtype)
    assert first.config == second.config
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(first)), nnx.to_flat_state(nnx.state(second)), strict=True
    ):
        a, b = np.asarray(a.get_value()), np.asarray(b.get_value())
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes(), path
    again = load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in again.values()} == {np.dtype(param_dtype)}


def test_bfloat16_compute_is_as_near_to_float32_as_that_of_torch(
    model_folder, network, outputs, ragged, torch_logits
):
    ids, mask = ragged()
    exact, _ = outputs(network, ids, mask)
    half = load_pretrained(model_folder, dtype=jnp.bfloat16)
    logits, values = outputs(half, ids, mask)
    assert logits.dtype == values.dtype == np.float32
    theirs = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    our_error, their_error = (
        np.sqrt(np.mean(np.square((x - exact)[mask])))
        for x in (logits, torch_logits(theirs, ids, mask))
    )
    assert 0 < our_error < 1.25 * their_error < 0.1


def test_padding_never_changes_real_positions(network, outputs, ragged):
    ids, mask = ragged()
    noise = np.random.default_rng(9).integers(0, 96, ids.shape)
    changed = np.where(mask, ids, noise)
    before, _ = outputs(network, ids, mask)
    after, _ = outputs(network, changed, mask)
    np.testing.assert_array_equal(before[mask], after[mask])
    assert np.isfinite(after).all()

    wider = np.pad(ids, [(0, 0), (0, 5)], constant_values=7)
    longer, _ = outputs(network, wider, np.pad(mask, [(0, 0), (0, 5)]))
    np.testing.assert_allclose(longer[:, :11][mask], before[mask], rtol=0, atol=1e-5)


def test_sequences_in_one_row_do_not_see_each_other(network, outputs):
    """Three of them, with padding before, between and behind, as each by itself."""
    rng = np.random.default_rng(2)
    row, number = rng.integers(0, 96, 20), np.zeros(20, int)
    for index, place in enumerate((slice(1, 6), slice(6, 13), slice(15, 18)), start=1):
        number[place] = index
    logits, values = outputs(network, row[None], number[None])
    for index in (1, 2, 3):
        alone = row[number == index][None]
        expected, expected_values = outputs(network, alone, np.ones_like(alone, bool))
        np.testing.assert_allclose(logits[0, number == index], expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            values[0, number == index], expected_values[0], rtol=0, atol=1e-5
        )


def test_the_future_never_changes_the_past(network, outputs, ragged):
    ids, _ = ragged()
    mask = np.ones_like(ids, bool)
    changed = ids.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 96
    before, after = (outputs(network, tokens, mask)[0] for tokens in (ids, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).min(axis=-1).max() > 0


def mean_logprob(network, ids, mask, *, remat=False):
    """Of each real token after the first, given those before it."""
    hidden, _ = network.backbone(ids, mask, remat=remat)
    log_p = jax.nn.log_softmax(network.logits(hidden[:, :-1]))
    chosen = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(chosen * mask[:, 1:]) / jnp.sum(mask[:, 1:])


GRADIENTS = {
    "tied": ({}, False),
    "untied, remat": ({"tie_word_embeddings": False}, True),
    **{name: (variant, False) for name, variant in RELATIVES.items()},
}


@pytest.mark.parametrize(("variant", "remat"), GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients_are_those_of_torch(variant, remat, torch_model, ragged, tmp_path):
    theirs = torch_model(**variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ids, mask = ragged()
    log_p = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.log_softmax(-1)
    chosen = log_p[:, :-1].gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0]
    chosen[torch.tensor(mask)[:, 1:]].mean().backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    graphdef, state = nnx.split(load_pretrained(tmp_path / "theirs"))

    @jax.jit
    @jax.grad
    def gradients(state):
        return mean_logprob(nnx.merge(graphdef, state), ids, mask, remat=remat)

    # Saving a network made of gradients gives them transformers' names.
    save_pretrained(nnx.merge(graphdef, gradients(state)), tmp_path / "gradients")
    ours = load_file(tmp_path / "gradients" / "model.safetensors")
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-5 * scale + 1e-8)


def test_remat_keeps_less_for_the_backward_pass(network, ragged):
    ids, mask = ragged()
    graphdef, state = nnx.split(network)

    def kept(remat):
        def loss(state):
            return mean_logprob(nnx.merge(graphdef, state), ids, mask, remat=remat)

        residuals = jax.eval_shape(lambda state: jax.vjp(loss, state)[1], state)
        parameters = sum(x.size for x in jax.tree.leaves(state))
        return sum(x.size for x in jax.tree.leaves(residuals)) - parameters

    assert kept(remat=True) < 0.5 * kept(remat=False)


def test_unstacked_layers_are_those_that_are_scanned(network, ragged):
    ids, mask = ragged()
    graphdef, state = nnx.split(network.backbone)

    @jax.jit
    def one_by_one(state):
        backbone = nnx.merge(graphdef, state)
        rotary = rotary_angles(jnp.maximum(jnp.cumsum(mask, -1) - 1, 0), backbone.config)
        visible = np.tril(np.ones((11, 11), bool)) & mask[:, None, :]
        x, kept = backbone.embed(ids), []
        for layer in backbone.unstacked_layers():
            x, key_value = layer(x, rotary, visible)
            kept.append(key_value)
        return backbone.norm(x), kept

    hidden, kept = one_by_one(state)
    expected, stacked = jax.jit(lambda state: nnx.merge(graphdef, state)(ids, mask))(state)
    assert stacked.key.shape == stacked.value.shape == (3, 4, 2, 11, 8)
    np.testing.assert_allclose(hidden[mask], expected[mask], rtol=0, atol=1e-5)
    assert len(kept) == 3
    for i, layer in enumerate(kept):
        for one, other in zip(layer, stacked, strict=True):
            one, other = (jnp.swapaxes(x, 1, 2)[mask] for x in (one, other[i]))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_a_new_network_is_drawn_with_standard_deviation_0_02():
    config = small_config(hidden_size=256, tie_word_embeddings=False)
    network = nnx.eval_shape(lambda: PolicyValueNetwork(config, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(network)
    state = jax.jit(lambda: nnx.state(PolicyValueNetwork(config, rngs=nnx.Rngs(0))))()
    backbone = nnx.merge(graphdef, state).backbone
    matrices = {
        "embed_tokens": backbone.embed_tokens,
        "lm_head": backbone.lm_head,
        "gate_proj": backbone.layers.mlp.gate_proj.weight,
        "q_proj": backbone.layers.self_attn.q_proj.weight,
    }
    for name, matrix in matrices.items():
        assert np.std(matrix[...]) == pytest.approx(0.02, rel=0.05), name
    gate = np.asarray(backbone.layers.mlp.gate_proj.weight[...])
    assert gate.shape == (3, 64, 256)
    assert not np.array_equal(gate[0], gate[1])  # each layer has its own key
    np.testing.assert_array_equal(backbone.layers.self_attn.q_proj.bias[...], 0.0)
    np.testing.assert_array_equal(backbone.norm.weight[...], 1.0)


# What their config.json say, without what says nothing of sizes.
QWEN3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
LLAMA_3_2_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DecoderConfig.qwen2_5_0_5b(), 494_032_768),
        (config_from_json(QWEN3_0_6B), 596_049_920),
        (config_from_json(LLAMA_3_2_1B), 1_235_814_400),
    ],
    ids=["Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B"],
)
def test_published_sizes(config, expected):
    """As the models' pages count them."""
    network = nnx.eval_shape(lambda: PolicyValueNetwork(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(network.backbone))) == expected
