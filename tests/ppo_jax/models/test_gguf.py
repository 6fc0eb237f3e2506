"""GGUF files, written here from random models the way llama.cpp's converter writes them."""

import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled

from ppo_jax.models import load_pretrained
from qwen_env.errors import UsageError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
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


def write_gguf(path, model, kind=F32, *, without=(), extra_tensors=(), architecture=None, **fields):
    """Write `model` with its matrices stored as `kind`, and put back into it what that lost."""
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
    }
    for name, value in (metadata | fields).items():
        if name not in without:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [F32, F16, Q8_0, Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("name", "tied"),
    [("LlamaForCausalLM", True), ("LlamaForCausalLM", False), ("Qwen2ForCausalLM", True)],
)
def test_parity_with_transformers(
    name, tied, kind, torch_model, torch_logits, outputs, ragged, tmp_path
):
    theirs = torch_model(name, tie_word_embeddings=tied)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, r"describes a model of type 'gpt2'; .*qwen2 and llama"),
        ({"without": ("block_count",)}, r"no metadata field qwen2\.block_count"),
        ({"without": ("token_embd.weight",)}, r"tensor token_embd\.weight is missing"),
        (
            {"without": ("blk.1.attn_q.bias",)},
            r"tensor model\.layers\.1\.self_attn\.q_proj\.bias is missing",
        ),
        ({"feed_forward_length": 60}, r"down_proj\.weight has shape \(32, 64\).* is \(32, 60\)"),
        ({"rope.scaling.type": "yarn"}, r"sets the RoPE type to 'yarn'"),
        ({"extra_tensors": ("rope_freqs.weight",)}, r"sets the RoPE type to 'rope_freqs\.weight'"),
        ({"extra_tensors": ("blk.0.attn_output.bias",)}, r"sets attention_bias to True"),
        ({"rope.dimension_count": 4}, r"sets partial_rotary_factor to 0\.5"),
        ({"attention.head_count_kv": 3}, r"num_attention_heads \(4\) must be a multiple"),
    ],
)
def test_bad_files(changes, message, torch_model, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", torch_model(), **changes)
    with pytest.raises(UsageError, match=message) as caught:
        load_pretrained(path)
    assert str(path) in str(caught.value)


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
    with pytest.raises(DependencyNotInstalled, match=r"pip install 'qwen-ppo-jax\[gguf\]'"):
        load_pretrained(tmp_path / "model.gguf")
