"""Adapters against peft: outputs, gradients, and folders in both directions."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from ppo_jax.config import OptimizerConfig
from ppo_jax.learning.frozen import join, partition
from ppo_jax.models import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
    with_separate_critic,
)
from ppo_jax.models.lora import has_adapters, merged
from qwen_env.errors import UsageError

# peft calls transformers by a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

WEIGHTS = "adapter_model.safetensors"


def adapted(network, seed=0, **settings):
    """(network with adapters whose B is random, what learns and what is frozen of it)"""
    graphdef, params, frozen = partition(network, OptimizerConfig(**settings), seed)
    rng = np.random.default_rng(seed)

    def noisy(path, x):
        is_b = "lora_B" in jax.tree_util.keystr(path)
        return jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if is_b else x

    params = jax.tree_util.tree_map_with_path(noisy, params)
    return nnx.merge(graphdef, join(params, frozen)), graphdef, params, frozen


def with_peft(base, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


VARIANTS = {
    "all layers": ({}, {"lora_rank": 3}),
    "two targets, other alpha": (
        {"name": "LlamaForCausalLM", "tie_word_embeddings": False},
        {"lora_rank": 5, "lora_alpha": 2.5, "lora_targets": ("q_proj", "mlp.down_proj")},
    ),
    "above frozen layers": (
        {"name": "Qwen3ForCausalLM", "head_dim": 20},
        {"lora_rank": 2, "num_frozen_layers": 2},
    ),
    "rank above the width, one layer": (
        {"num_hidden_layers": 1, "num_key_value_heads": 1},
        {"lora_rank": 40, "lora_alpha": 7, "lora_targets": ("v_proj",)},
    ),
}


@pytest.mark.parametrize(("shape", "settings"), VARIANTS.values(), ids=VARIANTS.keys())
def test_outputs_and_gradients_are_those_of_peft(
    shape, settings, torch_model, outputs, torch_logits, ragged, tmp_path
):
    base = tmp_path / "base"
    torch_model(**shape).save_pretrained(base)
    network, graphdef, params, frozen = adapted(load_pretrained(base), **settings)
    save_pretrained(network, tmp_path / "saved", base_model=str(base))
    ids, mask = ragged()
    theirs = with_peft(base, tmp_path / "saved" / "adapter")
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(outputs(network, ids, mask)[0][mask], expected[mask], atol=2e-5)
    assert np.abs(expected - torch_logits(theirs.get_base_model(), ids, mask)).max() < 1e-6
    with theirs.disable_adapter():
        assert np.abs(expected - torch_logits(theirs, ids, mask)).max() > 0.1, "or B is nothing"

    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    weights *= mask[..., None]

    def loss(params):
        return (nnx.merge(graphdef, join(params, frozen))(ids, mask)[0] * weights).sum()

    ours = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(params)["backbone"]))
    out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    (out * torch.tensor(weights)).sum().backward()
    gradients = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    first = settings.get("num_frozen_layers", 0)
    largest = max(np.abs(g).max() for g in gradients.values())
    seen = 0
    for (_, *path, _, part), variable in ours.items():
        for i, gradient in enumerate(np.asarray(variable.get_value()), first):
            name = f"base_model.model.model.layers.{i}.{'.'.join(path)}.{part}.default.weight"
            np.testing.assert_allclose(
                gradient, gradients[name], rtol=0, atol=1e-5 * largest, err_msg=name
            )
            seen += 1
    assert seen == len(gradients), "peft has adapters where we have them, and nowhere else"


@pytest.mark.parametrize("form", ["saved", "saved/adapter"])
def test_both_forms_are_the_network(form, torch_model, outputs, torch_logits, ragged, tmp_path):
    """The merged model is for whoever loads models, the adapter for peft; here, both load."""
    torch_model().save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base")
    network, *_ = adapted(base, lora_rank=4, num_frozen_layers=1)
    save_pretrained(network, tmp_path / "saved", base_model=str(tmp_path / "base"))
    ids, mask = ragged()
    expected = outputs(network, ids, mask)[0][mask]
    ours = load_pretrained(tmp_path / form)
    assert not has_adapters(ours)
    np.testing.assert_allclose(outputs(ours, ids, mask)[0][mask], expected, atol=2e-5)
    np.testing.assert_allclose(outputs(merged(network), ids, mask)[0][mask], expected, atol=2e-5)
    if form == "saved":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / form)
        np.testing.assert_allclose(torch_logits(theirs, ids, mask)[mask], expected, atol=2e-5)
        assert not list((tmp_path / form).glob("adapter*.*")), "or loaders take it for an adapter"


def test_at_first_they_change_nothing(torch_model, outputs, ragged, tmp_path):
    """Not a bit; and A is as wide as peft draws it."""
    torch_model().save_pretrained(tmp_path / "base")
    network = with_separate_critic(load_pretrained(tmp_path / "base"))
    graphdef, params, frozen = partition(network, OptimizerConfig(lora_rank=8), 3)
    same = nnx.merge(graphdef, join(params, frozen))
    ids, mask = ragged()
    for ours, expected in zip(outputs(same, ids, mask), outputs(network, ids, mask), strict=True):
        np.testing.assert_array_equal(ours, expected)
    for i, (path, variable) in enumerate(nnx.to_flat_state(params)):
        if path[-1] == "lora_A":
            a = np.asarray(variable.get_value())
            limit = 1 / math.sqrt(a.shape[-1])
            assert 0.95 * limit < np.abs(a).max() <= limit
            assert np.std(a) == pytest.approx(limit / math.sqrt(3), rel=0.1), i
    heads = {path[1] for path, _ in nnx.to_flat_state(params) if path[0] == "value_head"}
    assert heads == {"weight", "bias"}
    # The critic's backbone is frozen on the policy's own arrays, and costs nothing.
    for path, variable in nnx.to_flat_state(frozen["critic"]):
        other = dict(nnx.to_flat_state(frozen["backbone"]))[path]
        assert variable.get_value() is other.get_value(), path
    a = [params[part]["layers"]["mlp"]["up_proj"]["adapter"]["lora_A"] for part in PARTS]
    assert np.abs(a[0][...] - a[1][...]).max() > 0.1, "the two draw their own"


PARTS = "backbone", "critic"


def test_adapters_that_a_network_has_are_merged_before_it_gets_others(torch_model, tmp_path):
    torch_model().save_pretrained(tmp_path / "base")
    network, *_ = adapted(load_pretrained(tmp_path / "base"), lora_rank=2)
    _, _, frozen = partition(network, OptimizerConfig(lora_rank=3))
    before = nnx.state(merged(network))["backbone"]["layers"]["mlp"]["up_proj"]["weight"]
    after = frozen["backbone"]["layers"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(before[...], after[...])
    _, params, _ = partition(network, OptimizerConfig())
    assert not any("adapter" in path for path, _ in nnx.to_flat_state(params))


PEFT_SETTINGS = {
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {r"layers\.1\..*\.up_proj": 5}},
    "whole output projection": {"modules_to_save": ["lm_head"]},
    "output projection, saved with what it is added to": {"target_modules": ["lm_head", "k_proj"]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("settings", PEFT_SETTINGS.values(), ids=PEFT_SETTINGS.keys())
def test_what_peft_writes_is_read(settings, torch_model, outputs, torch_logits, ragged, tmp_path):
    base = tmp_path / "base"
    torch_model(tie_word_embeddings=False).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    targets = {"r": 3, "target_modules": "all-linear"} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **targets))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    ids, mask = ragged()
    ours = outputs(load_pretrained(tmp_path / "adapter"), ids, mask)[0]
    np.testing.assert_allclose(ours[mask], torch_logits(model, ids, mask)[mask], atol=5e-5)


def test_a_reward_models_head_goes_with_its_adapter(torch_model, outputs, ragged, tmp_path):
    base = tmp_path / "base"
    torch_model("Qwen2ForSequenceClassification", num_labels=1).save_pretrained(base)
    network, *_ = adapted(load_reward_model(base), lora_rank=2)
    network.score.weight[...] += 0.5
    save_reward_model(network, tmp_path / "saved", base_model=str(base))
    ids, mask = ragged()
    expected = outputs(network, ids, mask)
    for form in ("saved", "saved/adapter"):
        again = outputs(load_reward_model(tmp_path / form), ids, mask)
        np.testing.assert_allclose(again, expected, atol=2e-5)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "saved" / "adapter").eval()
    ids = np.where(mask, ids, 0)  # by which transformers finds the last token
    scores = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]
    np.testing.assert_allclose(scores.detach(), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, r"lora_rank is 0; it must be at least 1"),
        ({"lora_rank": -2}, r"lora_rank is -2; it must be at least 1"),
        ({"lora_alpha": 8}, r"lora_alpha is 8\.0, but there are no adapters; set lora_rank"),
        ({"lora_rank": 2, "lora_alpha": 0}, r"lora_alpha is 0\.0; it must be above 0"),
        ({"lora_targets": ("q_proj",)}, r"lora_targets is \('q_proj',\), but there are no adapt"),
        (
            {"lora_rank": 2, "lora_targets": ("q_proj", "qproj")},
            r"lora_targets has 'qproj', but .* no linear layer .*; perhaps you meant q_proj",
        ),
        (
            {"lora_rank": 2, "lora_targets": ("c_attn_0",)},
            r"has 'c_attn_0', .*; it has down_proj, .* and without lora_targets all of them",
        ),
        (
            {"lora_rank": 2, "num_frozen_layers": 3},
            r"num_frozen_layers is 3, so no layer is left for the adapters of lora_rank 2; lower",
        ),
    ],
    ids=str,
)
def test_wrong_settings(settings, message, torch_model, tmp_path):
    torch_model().save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match=message):
        adapted(load_pretrained(tmp_path / "base"), **settings)


def edit(**changes):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def without(*names):
    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({n: x for n, x in tensors.items() if not n.endswith(names)}, folder / WEIGHTS)

    return apply


def other_base(**changes):
    """Another model of the same name; with no changes, of the same shape."""

    def apply(folder):
        from tests.ppo_jax.models.conftest import make_torch_model

        base = folder.parent.parent / "base"
        shutil.rmtree(base)
        model = make_torch_model(**changes)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight += 0.01
        model.save_pretrained(base)

    return apply


BAD_ADAPTERS = {
    "no base": (edit(base_model_name_or_path=None), r"names no base model; set base_model_name_"),
    "no such base": (
        edit(base_model_name_or_path="/no/such/model"),
        r"The base model of the adapter .*/no/such/model: no such folder\. Or set base_model_name",
    ),
    "DoRA": (edit(use_dora=True), r"has use_dora = True, which is not computed here; merge it"),
    "biases": (edit(bias="all"), r"has bias = 'all', which is not computed here; merge"),
    "another kind": (edit(peft_type="IA3"), r"has peft_type = 'IA3', which is not computed"),
    "PiSSA": (edit(init_lora_weights="pissa"), r"init_lora_weights = 'pissa', which is not"),
    "no alpha": (edit(lora_alpha=None), r"has no lora_alpha; save the adapter again"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"has no adapter_model\.safetens"),
    "half a pair": (without("q_proj.lora_B.weight"), r"it changes .*q_proj\.weight' of shape \(32"),
    "another shape": (
        other_base(intermediate_size=48),
        r"is an adapter of another model than .*/base: .* shape \(32, 64\), but that model has sha",
    ),
    "fewer layers": (
        other_base(num_hidden_layers=2),
        r"is an adapter of another model than .*layers\.2\..*, but that model has none of that na",
    ),
    "other weights": (other_base(), r"is an adapter of another model than .*the weights are not"),
    "an adapter": (
        lambda folder: edit(base_model_name_or_path=str(folder))(folder),
        r"The base model of the adapter .* is an adapter as well; merge that",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS.keys())
def test_bad_adapters(damage, message, torch_model, tmp_path):
    torch_model().save_pretrained(tmp_path / "base")
    network, *_ = adapted(load_pretrained(tmp_path / "base"), lora_rank=2)
    save_pretrained(network, tmp_path / "saved", base_model=str(tmp_path / "base"))
    damage(tmp_path / "saved" / "adapter")
    with pytest.raises(UsageError, match=message) as error:
        load_pretrained(tmp_path / "saved" / "adapter")
    assert "\n" not in str(error.value)
