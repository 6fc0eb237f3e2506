"""GGUF files, written here from random models the way llama.cpp's converter writes them."""

import math
import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ppo_jax.models import gguf as gguf_module
from ppo_jax.models import load_pretrained, save_pretrained
from ppo_jax.models.rope import inverse_frequencies
from qwen_env.errors import UsageError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
F32, F16, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_1"))


def gguf_name(name):
    module, _, kind = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def permuted(tensor, heads):
    """Each head's halves interleaved: rows 0..N/2-1, N/2..N-1 become 0, N/2, 1, N/2+1, ..."""
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    path,
    model,
    kind=F32,
    *,
    without=(),
    extra_tensors=(),
    architecture=None,
    rope_factors=None,
    **fields,
):
    """Write `model` with its matrices stored as `kind`, and put back into it what that lost.

    Fields have the architecture's name before their own, unless theirs begins with a slash.
    """
    config = model.config
    architecture = architecture or config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if architecture == "qwen3":
        metadata |= {"attention.key_length": config.head_dim}
    for name, value in (metadata | fields).items():
        if name not in without:
            key = name[1:] if name.startswith("/") else f"{architecture}.{name}"
            add_field(writer, key, value)
    for name, parameter in model.named_parameters():
        stored_as = kind if parameter.ndim == 2 else F32
        data = gguf.quantize(parameter.detach().numpy(), stored_as)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(gguf.dequantize(data, stored_as)))
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            is_query = "q_proj" in name
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            data = permuted(data, heads)
        if gguf_name(name) not in without:
            writer.add_tensor(gguf_name(name), data, raw_dtype=stored_as)
    for name in extra_tensors:
        writer.add_tensor(name, np.ones(4, np.float32))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer, key, value):
    kinds = {bool: "bool", int: "int64", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


@pytest.mark.parametrize("kind", [F32, F16, Q8_0, Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("LlamaForCausalLM", True),
        ("LlamaForCausalLM", False),
        ("Qwen2ForCausalLM", True),
        ("Qwen3ForCausalLM", False),
    ],
)
def test_parity_with_transformers(
    name, tied, kind, torch_model, torch_logits, outputs, ragged, tmp_path
):
    theirs = torch_model(name, tie_word_embeddings=tied, head_dim=8)
    before = theirs.model.layers[0].self_attn.q_proj.weight.detach().clone()
    path = write_gguf(tmp_path / "model.gguf", theirs, kind)
    lost = (theirs.model.layers[0].self_attn.q_proj.weight - before).abs().max()
    assert (lost > 0) == (kind != F32)

    network = load_pretrained(path)
    assert (network.backbone.lm_head is None) == tied
    ids, mask = ragged()
    logits, values = outputs(network, ids, mask)
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(values, 0.0)


def test_untied_qwen2_with_wide_heads(torch_model, torch_logits, outputs, ragged, tmp_path):
    theirs = torch_model(tie_word_embeddings=False, head_dim=16)
    fields = {"attention.key_length": 16, "rope.dimension_count": 16}
    network = load_pretrained(write_gguf(tmp_path / "model.gguf", theirs, **fields))
    assert network.config.head_dim == 16
    ids, mask = ragged()
    logits, _ = outputs(network, ids, mask)
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_transformers_reads_the_same_tensors(name, torch_model, tmp_path):
    """Its reader, which knows nothing of ours: names, and the rotary halves of a llama."""
    size = 16 if name == "Qwen3ForCausalLM" else 8
    model = torch_model(name, tie_word_embeddings=False, head_dim=size)
    path = write_gguf(tmp_path / "model.gguf", model, **{"rope.dimension_count": size})
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    save_pretrained(load_pretrained(path), tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == read["tensors"].keys() == model.state_dict().keys()
    for key, tensor in read["tensors"].items():
        np.testing.assert_array_equal(ours[key], tensor.numpy(), err_msg=key)


def check_scaled(theirs, path, torch_logits, outputs, ragged):
    """That a file is read as `theirs`, beyond its original positions too, of which it has 9."""
    ids, mask = ragged()
    logits, _ = outputs(load_pretrained(path), ids, mask)
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_yarn(name, torch_model, torch_logits, outputs, ragged, tmp_path):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 9,
        "beta_fast": 1.5,
        "beta_slow": 0.25,
    }
    theirs = torch_model(name, rope_parameters=rope, head_dim=20)
    fields = {
        "attention.key_length": 20,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 9,
        "rope.scaling.yarn_beta_fast": 1.5,
        "rope.scaling.yarn_beta_slow": 0.25,
        "rope.scaling.yarn_attn_factor": 1.0,
    }
    path = write_gguf(tmp_path / "model.gguf", theirs, **fields)
    check_scaled(theirs, path, torch_logits, outputs, ragged)


def rope_factors(config):
    """As llama.cpp's converter writes them."""
    rope, factors = config.rope_parameters, []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = (turns - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.fixture
def llama3(torch_model):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return torch_model(
        "LlamaForCausalLM", rope_parameters=rope, head_dim=64, max_position_embeddings=131_072
    )


def test_llama3_scaling(llama3, tmp_path):
    factors = rope_factors(llama3.config)
    assert factors[0] == 1.0
    assert factors[-1] == 32.0
    assert np.sum((factors > 1) & (factors < 32)) >= 3
    fields = {"attention.key_length": 64, "rope_factors": factors}
    path = write_gguf(tmp_path / "model.gguf", llama3, **fields)
    config = load_pretrained(path).config
    inverse = llama3.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(config), inverse, rtol=4e-7)
    # Written, it has all that transformers wants to know.
    save_pretrained(load_pretrained(path), tmp_path / "saved")
    theirs = AutoConfig.from_pretrained(tmp_path / "saved")
    assert theirs.rope_parameters == llama3.config.rope_parameters


@pytest.mark.parametrize(
    "edit",
    [
        lambda factors: factors[:-1],
        lambda factors: factors.astype(np.float16),
        lambda factors: factors * np.float32(1.001),
        lambda factors: factors * np.float32(np.nan),
        lambda factors: factors * 0,
        lambda factors: np.linspace(1, 8, 32, dtype=np.float32),
    ],
)
def test_rope_factors_of_another_scaling(edit, llama3, tmp_path):
    factors = edit(rope_factors(llama3.config))
    fields = {"attention.key_length": 64, "rope_factors": factors}
    path = write_gguf(tmp_path / "model.gguf", llama3, **fields)
    with pytest.raises(UsageError, match=r"rope_freqs\.weight scales rotary positions") as caught:
        load_pretrained(path)
    assert str(path) in str(caught.value)


def test_the_head_size_of_a_qwen3_is_never_guessed(torch_model, tmp_path):
    theirs = torch_model("Qwen3ForCausalLM", head_dim=8)
    path = write_gguf(tmp_path / "model.gguf", theirs, without=("attention.key_length",))
    with pytest.raises(UsageError, match=r"no metadata field qwen3\.attention\.key_length"):
        load_pretrained(path)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_projection_is_the_embeddings_only_where_they_are_equal(
    same, torch_model, torch_logits, outputs, ragged, tmp_path
):
    """The metadata does not say whether they are tied."""
    theirs = torch_model(tie_word_embeddings=False)
    if same:
        with torch.no_grad():
            theirs.lm_head.weight.copy_(theirs.model.embed_tokens.weight)
    network = load_pretrained(write_gguf(tmp_path / "model.gguf", theirs))
    assert (network.backbone.lm_head is None) == same
    ids, mask = ragged()
    logits, _ = outputs(network, ids, mask)
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)


NEUTRAL = [
    {"vocab_size": 96},
    {"attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8},
    {"rope.scaling.type": "none", "rope.scaling.factor": 1.0},
    {"rope.scaling.type": "linear", "rope.scaling.finetuned": False, "rope.scale_linear": 0.0},
    {"attention.causal": True, "attention.scale": 0.0, "attention.sliding_window": 0},
    {"logit_scale": 1.0, "residual_scale": 0.0, "embedding_scale": 0.0},
    {"expert_count": 0, "expert_used_count": 0, "pooling_type": 0, "nextn_predict_layers": 0},
    {"tensor_data_layout": "Meta AI original pth"},
    {"/general.type": "model", "/general.name": "x", "/general.sampling.temp": 0.5},
    {"/split.count": 1, "/tokenizer.ggml.model": "gpt2", "/another.expert_count": 8},
    {"without": ("attention.layer_norm_rms_epsilon", "context_length")},
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=str)
def test_metadata_that_changes_nothing(
    changes, torch_model, torch_logits, outputs, ragged, tmp_path
):
    theirs = torch_model(rms_norm_eps=1e-6)
    network = load_pretrained(write_gguf(tmp_path / "model.gguf", theirs, **changes))
    ids, mask = ragged()
    logits, _ = outputs(network, ids, mask)
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)


BAD_FILES = [
    ({"architecture": "gpt2"}, r"describes a model of type 'gpt2'; .*qwen2, qwen3 and llama"),
    ({"architecture": "qwen3moe"}, r"describes a model of type 'qwen3moe'"),
    ({"without": ("block_count",)}, r"no metadata field qwen2\.block_count"),
    ({"without": ("attention.head_count",)}, r"no metadata field qwen2\.attention\.head_count"),
    ({"without": ("token_embd.weight",)}, r"tensor token_embd\.weight is missing"),
    (
        {"without": ("blk.1.attn_q.bias",)},
        r"tensor model\.layers\.1\.self_attn\.q_proj\.bias is missing",
    ),
    ({"feed_forward_length": 60}, r"down_proj\.weight has shape \(32, 64\).* is \(32, 60\)"),
    ({"feed_forward_length": [64, 64, 64]}, r"intermediate_size is \[64, 64, 64\]; it must"),
    ({"block_count": 10**9}, r"holds 38 tensors, too few for the 1000000000 layers"),
    ({"block_count": 2}, r"no place for tensor 'model\.layers\.2\.\S+' \(as for 11 others\)"),
    ({"embedding_length": 0}, r"hidden_size is 0; it must be an integer"),
    ({"embedding_length": "x"}, r"hidden_size is 'x'; it must be an integer"),
    ({"embedding_length": True}, r"hidden_size is True; it must be an integer"),
    ({"attention.head_count": 0}, r"num_attention_heads is 0; it must be an integer"),
    ({"attention.head_count_kv": 3}, r"num_attention_heads \(4\) must be a multiple"),
    ({"attention.layer_norm_rms_epsilon": float("inf")}, r"rms_norm_eps is inf; it must"),
    ({"rope.freq_base": -1.0}, r"rope_theta is -1\.0; it must be a positive number"),
    ({"vocab_size": 95}, r"embed_tokens\.weight has shape \(96, 32\).* is \(95, 32\)"),
    ({"rope.scaling.type": "longrope"}, r"scaling\.type' is 'longrope'; .* only 'none'"),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0},
        r"factor is 0\.0; it must be a positive number",
    ),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.yarn_attn_factor": 0.5},
        r"yarn_attn_factor' is 0\.5; .* only 1\.0",
    ),
    ({"rope.scaling.original_context_length": 8}, r"original_context_length' is 8; .* nothing"),
    ({"rope.scaling.factor": 4.0}, r"'qwen2\.rope\.scaling\.factor' is 4\.0; .* only 1\.0"),
    ({"rope.dimension_count": 4}, r"rope\.dimension_count is 4; .* one size, here 8"),
    ({"attention.value_length": 16}, r"attention\.value_length is 16; .* one size, here 8"),
    ({"attention.causal": False}, r"'qwen2\.attention\.causal' is False; .* only True"),
    ({"attention.sliding_window": 4096}, r"sliding_window' is 4096; .* only 0"),
    ({"expert_count": 8}, r"'qwen2\.expert_count' is 8; .* only 0"),
    ({"logit_scale": 0.5}, r"'qwen2\.logit_scale' is 0\.5; .* only 1\.0"),
    ({"something.new": 3}, r"'qwen2\.something\.new' is 3; this port computes nothing of that"),
    ({"/general.type": "adapter"}, r"holds no model \(its general\.type is 'adapter'\)"),
    ({"/split.count": 2}, r"is part 1 of a model that is split into 2 files; join them"),
    (
        {"extra_tensors": ("rope_freqs.weight",)},
        r"tensor 'rope_freqs\.weight' belongs to a variant",
    ),
    ({"extra_tensors": ("model.norm.weight",)}, r"tensor 'model\.norm\.weight' belongs to a"),
    ({"extra_tensors": ("blk.0.attn_qkv.weight",)}, r"tensor 'blk\.0\.attn_qkv\.weight' belongs"),
    ({"extra_tensors": ("blk.0.attn_output.bias",)}, r"no place for tensor '\S+o_proj\.bias'"),
    ({"extra_tensors": ("blk.3.attn_q.bias",)}, r"no place for tensor '\S+3\.self_attn\.q_proj"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FILES, ids=str)
def test_bad_files(changes, message, torch_model, tmp_path):
    """A sentence, and no array is made that the file does not hold."""
    path = write_gguf(tmp_path / "model.gguf", torch_model(), **changes)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message) as caught:
            load_pretrained(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")
    assert str(caught.value).isprintable()


values = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(width=32)
    | st.text(max_size=5)
    | st.lists(st.integers(0, 99), min_size=1, max_size=3)
)
names = st.sampled_from(
    [
        *gguf_module._CONFIG_KEYS,
        *gguf_module._HEAD_SIZES,
        *gguf_module._YARN_KEYS,
        *gguf_module._NEUTRAL,
        *("/general.type", "/split.count", "/general.name"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names | st.text(min_size=1, max_size=5), values, max_size=4))
def test_any_metadata_is_a_model_or_a_sentence(small_model, tmp_path_factory, fields):
    path = write_gguf(tmp_path_factory.mktemp("fuzz") / "model.gguf", small_model, **fields)
    try:
        load_pretrained(path)
    except UsageError as error:
        assert str(error).endswith(".")
        assert str(error).isprintable()


@pytest.fixture(scope="module")
def small_model(torch_model):
    return torch_model(num_hidden_layers=1)


def test_missing_layer_tensor_of_a_llama_is_not_taken_for_zeros(torch_model, tmp_path):
    theirs = torch_model("LlamaForCausalLM")
    path = write_gguf(tmp_path / "model.gguf", theirs, without=("blk.0.ffn_up.weight",))
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj\.weight is missing"):
        load_pretrained(path)


def test_a_quantisation_that_cannot_be_undone(torch_model, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", torch_model(), Q8_0)

    def dequantize(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    with pytest.raises(
        UsageError, match=r"tensor .*weight is stored as \w+, which the gguf package"
    ):
        load_pretrained(path)


def test_not_a_gguf_file(tmp_path, torch_model):
    path = tmp_path / "model.gguf"
    with pytest.raises(UsageError, match=r"model\.gguf: no such file\."):
        load_pretrained(path)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"model\.gguf is not a GGUF file"):
        load_pretrained(path)
    path.write_bytes(struct.pack("<4sI", b"PK\x03\x04", 3) * 100)
    with pytest.raises(UsageError, match=r"model\.gguf is not a GGUF file"):
        load_pretrained(path)
    whole = write_gguf(tmp_path / "whole.gguf", torch_model()).read_bytes()
    for length in (10, 300, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"model\.gguf is not a GGUF file"):
            load_pretrained(path)


def test_without_the_gguf_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyNotInstalled, match=r"pip install gguf"):
        load_pretrained(tmp_path / "model.gguf")
