"""`config.json` against transformers: the same model, or a sentence."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from ppo_jax.models import DecoderConfig, load_pretrained
from ppo_jax.models.config import MODEL_TYPES
from ppo_jax.models.config_json import NEUTRAL_VALUES, config_from_json, config_to_json
from qwen_env.errors import UsageError

BASE = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
USED = {
    *BASE,
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "tie_word_embeddings",
    "max_position_embeddings",
    "layer_types",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
}
HARMLESS = {
    # Where it comes from, and what wrote it.
    "_name_or_path": "elsewhere/model",
    "architectures": ["Qwen2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},  # remote code, which never runs
    "transformers_version": "4.31.0",
    "unsloth_version": "2025.1",
    # How it is stored or run, not what is computed.
    "chunk_size_feed_forward": 8,
    "dtype": "bfloat16",
    "output_attentions": False,
    "output_hidden_states": True,
    "pretraining_tp": 2,  # the same products, in slices
    "return_dict": True,
    "torch_dtype": "float16",
    "torchscript": True,
    "use_cache": False,
    # Of a training with dropout or from scratch; here there is neither.
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    # Of tokens and of generation.
    "bos_token_id": 7,
    "eos_token_id": [8, 9],
    "pad_token_id": 5,
    "max_length": 3,
    "repetition_penalty": 1.5,
    "temperature": 0.1,
    # Of other heads.
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "num_labels": 2,
    "problem_type": "regression",
    # Read only where RoPE is scaled.
    "original_max_position_embeddings": 16,
}
"""Keys that transformers knows, or that are common, with a value that is not its default."""


NAMES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
ABSENT = "the key is removed"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 1.2,
    "original_max_position_embeddings": 9,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def edited(content, changes):
    return {k: v for k, v in (content | changes).items() if v is not ABSENT}


def refusal(content):
    """The sentence with which it is refused, or None."""
    try:
        config = config_from_json(content, "some/config.json")
    except UsageError as error:
        message = str(error)
        assert message.startswith("some/config.json"), message
        assert message.endswith("."), message
        assert message.isprintable(), message
        return message
    assert isinstance(config, DecoderConfig)
    return None


@pytest.mark.parametrize("their_config", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_every_key_of_transformers_is_known(their_config):
    """A release that adds one fails here, until it is used, refused or found to be harmless."""
    fields = {field.name for field in dataclasses.fields(their_config)}
    assert not fields - USED - HARMLESS.keys() - NEUTRAL_VALUES.keys()


@pytest.fixture(scope="module")
def folders(torch_model, tmp_path_factory):
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name)
        torch_model(name).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def check_logits(folders, torch_logits, outputs, ragged):
    """That a model with these changes to its config is what it is to transformers."""

    def check(name, changes):
        path = folders[name] / "config.json"
        original = path.read_text()
        path.write_text(json.dumps(edited(json.loads(original), changes)))
        try:
            theirs = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
            network = load_pretrained(folders[name])
        finally:
            path.write_text(original)
        ids, mask = ragged()
        expected, (logits, _) = torch_logits(theirs, ids, mask), outputs(network, ids, mask)
        np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)
        return logits

    return check


@pytest.mark.parametrize("name", NAMES)
def test_harmless_keys_change_nothing_in_transformers_either(name, check_logits):
    before = check_logits(name, {})
    for key, value in HARMLESS.items():
        np.testing.assert_array_equal(check_logits(name, {key: value}), before, err_msg=key)


OF_ALL = [
    {"rope_theta": 500.0},  # as in the group
    {"rope_parameters": ABSENT, "rope_theta": 700},
    {"rope_parameters": ABSENT, "rope_scaling": None},
    {"rope_parameters": None, "rope_scaling": {"type": "default"}, "rope_theta": 700.0},
    {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}, "rope_scaling": {}},
    {"rope_parameters": ABSENT, "rope_scaling": {"rope_type": "default", "rope_theta": 700.0}},
    # Scaled: as transformers 5 writes it, as transformers 4 did, and as Qwen's cards have it.
    {"rope_parameters": LLAMA3 | {"rope_theta": 700.0}},
    {"rope_parameters": ABSENT, "rope_scaling": LLAMA3, "rope_theta": 700.0},
    {"rope_parameters": YARN | {"rope_theta": 700.0}},
    {"rope_parameters": ABSENT, "rope_scaling": YARN, "rope_theta": 700},
    {
        "rope_parameters": ABSENT,
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8},
        "rope_theta": 700.0,
    },
    {"rope_parameters": {"type": "yarn"} | YARN, "original_max_position_embeddings": 8},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 8},
    {"rope_parameters": YARN | {"attention_factor": None, "truncate": False, "beta_fast": 4}},
    {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 8,
    },
    {"rms_norm_eps": ABSENT},
    {"rms_norm_eps": 0.5},
    {"hidden_act": "swish"},
    {"partial_rotary_factor": 1.0},
    {"max_position_embeddings": 3},
    {"layer_types": ["full_attention"] * 3},
    {"is_causal": True},
    {"per_layer_config": {}},
    {"mlp_bias": False},
    {"an_unknown_key": {"of": ["someone", "else"]}},
    {"logit_scale": None},
]
OF_QWEN2 = [
    {"sliding_window": 2},
    {"sliding_window": 2, "use_sliding_window": False, "max_window_layers": 0},
    {"sliding_window": 2, "use_sliding_window": True, "max_window_layers": 3, "layer_types": None},
    {"sliding_window": 2, "use_sliding_window": True, "layer_types": ["attention"] * 3},
    {"sliding_window": None, "use_sliding_window": True, "layer_types": ABSENT},
    {"attention_bias": False},  # of Llama and Qwen3
    {"attention_bias": True},
]
OF_QWEN3 = [
    *OF_QWEN2[:-1],
    {"head_dim": ABSENT},  # 128
]
OF_LLAMA = [
    {"head_dim": None},
    {"head_dim": ABSENT},
    {"sliding_window": None},
    {"use_sliding_window": True, "max_window_layers": 0},
]


@pytest.mark.parametrize(
    ("name", "changes"),
    [(NAMES[0], changes) for changes in (*OF_ALL, *OF_QWEN2)]
    + [(NAMES[1], changes) for changes in (*OF_ALL, *OF_QWEN3)]
    + [(NAMES[2], changes) for changes in (*OF_ALL, *OF_LLAMA)],
    ids=str,
)
def test_what_is_accepted_is_what_it_is_to_transformers(name, changes, check_logits):
    check_logits(name, changes)


REFUSED = [
    ({"model_type": "gpt2"}, r"describes a model of type 'gpt2'; .*qwen2, qwen3 and llama"),
    ({"model_type": "qwen3_moe"}, r"describes a model of type 'qwen3_moe'"),
    ({"model_type": "gemma3_text"}, r"describes a model of type 'gemma3_text'"),
    ({"model_type": ABSENT}, "of type None"),
    ({"model_type": ["qwen2"]}, "of type \\['qwen2'\\]"),
    *(({key: ABSENT}, f"there is no {key}") for key in BASE if key[-5:] not in ("_type", "heads")),
    ({"num_attention_heads": None}, "there is no num_attention_heads"),
    ({"vocab_size": "many"}, "vocab_size is 'many'; it must be an integer"),
    ({"vocab_size": 96.0}, r"vocab_size is 96\.0; it must be an integer"),
    ({"vocab_size": True}, "vocab_size is True; it must be an integer"),
    ({"hidden_size": {"a": 1}}, "hidden_size is {'a': 1}; it must be an integer"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be an integer from 1"),
    ({"num_attention_heads": -4}, "num_attention_heads is -4; it must"),
    ({"intermediate_size": 2**31}, "intermediate_size is 2147483648; it must"),
    ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple"),
    ({"head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
    ({"hidden_size": 2}, "head_dim is 0; it must"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf; it must be a positive number"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must"),
    ({"rms_norm_eps": True}, "rms_norm_eps is True; it must"),
    ({"rope_theta": 10**400}, "rope_theta is 1000.*; it must"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
    ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
    ({"rope_scaling": 5}, "rope_scaling is 5; it must be an object"),
    (
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "rope_scaling": {"type": "yarn", "factor": 4.0},
        },
        "rope_parameters and rope_scaling differ",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type is 'linear'; this port computes only 'default', 'llama3', 'yarn'",
    ),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; .* only 'default'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type is \['yarn'\]"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5}}}, "'full_attention' of 'default'"),
    ({"rope_scaling": {"factor": 2.0}}, r"'factor' of 'default' RoPE is 2\.0"),
    (
        {"rope_scaling": YARN | {"type": "linear"}},
        "rope_type is 'linear' and, with the other settings of RoPE, 'yarn'; leave one",
    ),
    (
        {"rope_scaling": YARN, "original_max_position_embeddings": 16},
        "original_max_position_embeddings is 16 and, with the other settings of RoPE, 8",
    ),
    (
        {"rope_scaling": {"rope_type": "yarn"}},
        "there is no factor, which RoPE of type 'yarn' needs",
    ),
    ({"rope_scaling": YARN | {"factor": "4"}}, "factor is '4'; it must be a positive number"),
    ({"rope_scaling": YARN | {"factor": -4.0}}, r"factor is -4\.0; it must be a positive number"),
    ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor is 0; it must be"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1; it must be true or false"),
    ({"rope_scaling": YARN | {"mscale": 0.7}}, r"'mscale' of 'yarn' RoPE is 0\.7"),
    ({"rope_scaling": YARN, "rope_theta": 1}, r"rope_theta is 1\.0; YaRN needs more than 1"),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 8.5}},
        r"original_max_position_embeddings is 8\.5; it must be an integer",
    ),
    (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 0.2}},
        r"high_freq_factor is 0\.2; it must be greater than low_freq_factor, which is 0\.2",
    ),
    ({"rope_scaling": LLAMA3 | {"beta_fast": 3}}, "'beta_fast' of 'llama3' RoPE is 3"),
    (
        {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 10000.0},
        r"rope_theta is 10000\.0 and, with the other settings of RoPE, 500\.0",
    ),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; .* only 1\.0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0"),
    ({"use_sliding_window": True, "max_window_layers": 0}, "sliding_window is 4096; .*only full"),
    (
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 3},
        "sliding_window is 3; .*only full",
    ),
    ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'; it must be true or false"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types is .*; it must list 3 layers"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; it must list"),
    (
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
        "layer_types is 'sliding_attention'; .* only 'full_attention'",
    ),
    ({"model_type": "llama", "sliding_window": 3}, "sliding_window is 3"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias is True; .* only False"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True; .* only False"),
    (
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0},
        "sliding_window is 4096",
    ),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this port computes only 'silu'"),
    ({"is_causal": False}, "is_causal is False"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq.*without"),
    ({"per_layer_config": {"0": {"intermediate_size": 3}}}, "per_layer_config is"),
    ({"num_experts": 8}, "num_experts is 8"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_what_is_not_computed_is_refused_by_name(changes, message):
    with pytest.raises(UsageError, match=message):
        config_from_json(edited(BASE, changes))
    refusal(edited(BASE, changes))


ODD = [
    *(None, True, False, 0, 1, 2, -1, 0.5, 1.0, 64, 10**9, 10**30, math.inf, math.nan),
    *("x", "", "\x1b[2J\n", [], [1], {}, {"a": 1}, {"rope_type": []}, [[None]]),
    *({"rope_type": "yarn", "factor": x} for x in (None, 10**400, [], 1e-300, True)),
]


def test_any_key_may_hold_anything():
    for key in USED | HARMLESS.keys() | NEUTRAL_VALUES.keys():
        for value in (*ODD, ABSENT):
            for model_type in MODEL_TYPES:
                refusal(edited(BASE | {"model_type": model_type}, {key: value}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
known_keys = st.sampled_from(sorted(USED | NEUTRAL_VALUES.keys()))


@given(st.dictionaries(known_keys | st.text(max_size=8), json_values, max_size=6))
def test_any_json_is_a_config_or_a_sentence(changes):
    refusal(changes)
    refusal(BASE | changes)


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3, YARN | {"beta_fast": 8.0}])
@pytest.mark.parametrize("name", NAMES)
def test_our_config_is_read_alike_by_transformers(name, rope, torch_model, tmp_path):
    rope = rope | {"rope_theta": 500.0}
    theirs = torch_model(name, head_dim=20, num_key_value_heads=1, rope_parameters=rope).config
    theirs.save_pretrained(tmp_path)
    ours = config_from_json(json.loads((tmp_path / "config.json").read_text()))
    written = config_to_json(ours)
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    for key in written.keys() - {"rope_theta", "rope_scaling", "architectures"}:
        assert getattr(again, key) == getattr(theirs, key), key
    assert again.rope_parameters == theirs.rope_parameters
    assert config_from_json(written) == ours
    if rope["rope_type"] == "default":
        assert "rope_scaling" not in written
    else:  # nothing but what differs from the defaults
        assert written["rope_scaling"].keys() == rope.keys() - {"rope_theta"}
