"""Models from files, as transformers reads them, and all the ways for files to be wrong."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as torch_tensors
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_jax.models import load_pretrained, load_reward_model, save_pretrained, save_reward_model
from ppo_jax.models.safetensors_folder import SafetensorsFolder
from qwen_env.errors import UsageError


def edit_json(path, **changes):
    """Set fields; a field set to None is removed."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def state_of(network):
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(network))
    }


def assert_same(a, b):
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class TestReading:
    def test_shards_with_an_index(self, torch_model, model_folder, tmp_path):
        torch_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
        assert_same(load_pretrained(tmp_path / "sharded"), load_pretrained(model_folder))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_weights(
        self, dtype, torch_model, torch_logits, outputs, ragged, tmp_path
    ):
        torch_model().to(dtype).save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        ids, mask = ragged()
        logits, _ = outputs(load_pretrained(tmp_path), ids, mask)
        expected = torch_logits(theirs, ids, mask)
        np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)

    def test_one_file_wins_over_an_index_as_in_transformers(self, model_folder):
        (model_folder / "model.safetensors.index.json").write_text("{}")
        load_pretrained(model_folder)

    def test_a_home_directory_is_expanded(self, model_folder, monkeypatch):
        monkeypatch.setenv("HOME", str(model_folder.parent))
        load_pretrained("~/model")


class TestTying:
    """Of the output projection and the embeddings, where the config says that they are."""

    @pytest.fixture
    def parity(self, model_folder, torch_logits, outputs, ragged):
        def check():
            theirs = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
            ids, mask = ragged()
            network = load_pretrained(model_folder)
            logits, _ = outputs(network, ids, mask)
            expected = torch_logits(theirs, ids, mask)
            np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)
            return network

        return check

    def test_another_projection_in_the_file_is_used(self, parity, model_folder):
        other = np.random.default_rng(0).normal(0, 32**-0.5, (96, 32)).astype(np.float32)
        edit_tensors(
            model_folder / "model.safetensors", lambda t: t.update({"lm_head.weight": other})
        )
        network = parity()
        assert not network.config.tie_word_embeddings
        np.testing.assert_array_equal(network.backbone.lm_head[...], other)

    def test_the_same_one_is_none(self, parity, model_folder):
        edit_tensors(
            model_folder / "model.safetensors",
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}),
        )
        network = parity()
        assert network.backbone.lm_head is None

    def test_one_in_the_place_of_the_embeddings_is_both(self, parity, model_folder):
        edit_tensors(
            model_folder / "model.safetensors",
            lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        )
        assert parity().backbone.lm_head is None

    def test_a_projection_of_another_size_is_of_another_model(self, model_folder):
        edit_tensors(
            model_folder / "model.safetensors",
            lambda t: t.update({"lm_head.weight": np.zeros((97, 32), np.float32)}),
        )
        with pytest.raises(UsageError, match=r"lm_head\.weight has shape \(97, 32\), but"):
            load_pretrained(model_folder)


class TestValueHead:
    @pytest.fixture
    def folder(self, model_folder):
        network = load_pretrained(model_folder)
        network.value_head.weight[...] = jnp.arange(32.0)[None] / 32
        network.value_head.bias[...] = jnp.array([0.25])
        save_pretrained(network, model_folder)
        return model_folder

    def test_round_trip(self, folder, outputs, ragged):
        network = load_pretrained(folder)
        ids, mask = ragged()
        hidden, _ = outputs(network.backbone, ids, mask)
        _, values = outputs(network, ids, mask)
        expected = hidden[mask] @ (np.arange(32) / 32) + 0.25
        np.testing.assert_allclose(values[mask], expected, rtol=0, atol=1e-5)
        assert np.abs(values[mask]).min() > 0

    def test_where_it_was_before(self, folder):
        """Folders of version 0.1.0 have it beside the model."""
        network = load_pretrained(folder)
        (folder / "critic" / "value_head.safetensors").rename(folder / "value_head.safetensors")
        assert_same(load_pretrained(folder), network)
        shutil.copy(folder / "value_head.safetensors", folder / "critic")
        with pytest.raises(UsageError, match=r"'value_head\.\w+' is in .* and in .*; remove the"):
            load_pretrained(folder)

    def test_transformers_does_not_mind_it(self, folder):
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (
                {"weight": np.zeros((1, 31), np.float32), "bias": np.zeros(1, np.float32)},
                r"value_head.weight has shape \(1, 31\), but .*config.json it is \(1, 32\)",
            ),
            ({"weight": np.zeros((1, 32), np.float32)}, "value_head.bias is missing"),
            ({"v_head": np.zeros((1, 32), np.float32)}, "value_head.bias is missing"),
            (
                {
                    "weight": np.zeros((1, 32), np.float32),
                    "bias": np.zeros(1, np.float32),
                    "scale": np.ones(1, np.float32),
                },
                "no place for tensor 'value_head.scale' in the model",
            ),
        ],
    )
    def test_of_another_model(self, head, message, folder):
        save_file(head, folder / "critic" / "value_head.safetensors")
        with pytest.raises(UsageError, match=message):
            load_pretrained(folder)

    def test_cut_short(self, folder):
        path = folder / "critic" / "value_head.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(UsageError, match=r"value_head.safetensors is not a readable"):
            load_pretrained(folder)


class TestRewardModel:
    @pytest.mark.parametrize(
        ("family", "tied"), [("Qwen2", True), ("Qwen2", False), ("Qwen3", True), ("Llama", False)]
    )
    def test_parity_both_ways(self, family, tied, torch_model, outputs, ragged, tmp_path):
        theirs = torch_model(
            f"{family}ForSequenceClassification", num_labels=1, tie_word_embeddings=tied, head_dim=8
        )
        theirs.save_pretrained(tmp_path / "theirs")
        ids, mask = ragged()
        ids = np.where(mask, ids, theirs.config.pad_token_id)  # transformers looks for these
        with torch.no_grad():
            expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]
        model = load_reward_model(tmp_path / "theirs")
        scores = outputs(model, ids, mask)
        assert scores.dtype == np.float32
        assert np.std(scores) > 0.1
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)

        save_reward_model(model, tmp_path / "ours")
        again, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "ours", output_loading_info=True, pad_token_id=0
        )
        assert not any(info.values())
        assert again.config.num_labels == 1
        with torch.no_grad():
            back = again(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]
        np.testing.assert_allclose(back, expected, rtol=0, atol=1e-5)

    def test_made_from_a_language_model(self, torch_model, tmp_path):
        """Whose output projection may still be there; transformers passes over it."""
        theirs = torch_model("Qwen2ForSequenceClassification", num_labels=1)
        theirs.save_pretrained(tmp_path)
        before = load_reward_model(tmp_path)
        head = np.ones((96, 32), np.float32)
        edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": head}))
        assert_same(load_reward_model(tmp_path), before)

    def test_as_a_policy(self, torch_model, tmp_path):
        torch_model("Qwen2ForSequenceClassification", num_labels=1).save_pretrained(tmp_path)
        with pytest.raises(UsageError, match=r"no place for tensor 'score\.weight' in the model"):
            load_pretrained(tmp_path)

    def test_with_two_labels(self, torch_model, tmp_path):
        theirs = torch_model("Qwen2ForSequenceClassification", num_labels=2)
        theirs.save_pretrained(tmp_path)
        with pytest.raises(UsageError, match=r"score.weight has shape \(2, 32\).* is \(1, 32\)"):
            load_reward_model(tmp_path)

    def test_that_is_a_language_model(self, model_folder):
        with pytest.raises(UsageError, match=r"tensor score\.weight is missing"):
            load_reward_model(model_folder)


def no_config(folder):
    (folder / "config.json").unlink()


def broken_json(folder):
    (folder / "config.json").write_text('{"model_type": "qwen2",')


def json_list(folder):
    (folder / "config.json").write_text("[]")


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def missing_tensor(folder):
    edit_tensors(
        folder / "model.safetensors", lambda t: t.pop("model.layers.1.self_attn.k_proj.bias")
    )


def wrong_shape(folder):
    edit_tensors(
        folder / "model.safetensors",
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((64, 30), np.float32)}),
    )


def index(content):
    def edit(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return edit


def tensors(**changes):
    """Set tensors, by name with __ for a point; one set to None is removed."""

    def edit(folder):
        def change(stored):
            stored.update({name.replace("__", "."): x for name, x in changes.items()})
            for name in [name for name, x in stored.items() if x is None]:
                del stored[name]

        edit_tensors(folder / "model.safetensors", change)

    return edit


def more_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2)


def as_type(dtype):
    def edit(folder):
        edit_tensors(
            folder / "model.safetensors",
            lambda t: t.update({"model.norm.weight": np.ones(32, dtype)}),
        )

    return edit


def in_float8(folder):
    stored = torch_tensors.load_file(folder / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"].to(torch.float8_e4m3fn)
    torch_tensors.save_file(stored, folder / "model.safetensors")


def twice_in_the_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"hidden_size": 64, ', 1))


def deeply_nested(folder):
    (folder / "config.json").write_text("[" * 100_000)


def in_two_shards(folder):
    index('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')(folder)
    save_file({"model.norm.weight": np.ones(32)}, folder / "model-2.safetensors")


def a_pipe(name):
    def edit(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return edit


def an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


NORM = "model__norm__weight"
BAD_FOLDERS = [
    (no_config, r"model has no config\.json; a model is a folder"),
    (a_pipe("config.json"), r"config\.json is a pipe; it must be a file"),
    (broken_json, r"config\.json is not valid JSON: .*line 1 column"),
    (deeply_nested, r"config\.json is not valid JSON: it is nested too deeply"),
    (twice_in_the_config, r"config\.json is not valid JSON: 'hidden_size' stands there twice"),
    (json_list, r"config\.json holds a list; it must hold an object"),
    (config(model_type="gpt2"), r"config\.json describes a model of type 'gpt2'"),
    (config(hidden_size=None), r"config\.json: there is no hidden_size"),
    (an_adapter, r"adapter_config\.json names no base model; set base_model_name_or_path"),
    (only_pickle, r"no model\.safetensors, only pytorch_model\.bin, and pickled .* never loaded"),
    (no_weights, r"model has no model\.safetensors; save the model with"),
    (a_pipe("model.safetensors"), r"model\.safetensors is a pipe; it must be a file"),
    (truncated, r"model\.safetensors is not a readable safetensors file"),
    (not_safetensors, r"model\.safetensors is not a readable safetensors file"),
    (missing_tensor, r"tensor model\.layers\.1\.self_attn\.k_proj\.bias is missing"),
    (
        wrong_shape,
        r"layers\.2\.mlp\.up_proj\.weight has shape \(64, 30\).*config\.json it is \(64, 32\)",
    ),
    (config(num_hidden_layers=4, layer_types=None), r"tensor model\.layers\.3\..* is missing"),
    (
        config(num_hidden_layers=10**9, layer_types=None),
        r"38 tensors, too few for the 1000000000 layers",
    ),
    (config(vocab_size=10**9), r"shape \(96, 32\), but .* it is \(1000000000, 32\)"),
    (config(intermediate_size=10**9), r"shape \(32, 64\), but .* it is \(32, 1000000000\)"),
    (config(head_dim=10**9), r"shape \(16,\), but .* it is \(2000000000,\)"),
    (config(tie_word_embeddings=False), r"tensor lm_head\.weight is missing"),
    (more_layers, r"no place for tensor 'model\.layers\.2\.[\w.]+' \(as for 11 others\) in the"),
    (tensors(model__layers__0__self_attn__o_proj__bias=np.ones(32)), r"'\S+o_proj\.bias' in the"),
    (tensors(v_head__summary__weight=np.ones((1, 32))), r"no place for tensor 'v_head\.summary\."),
    (tensors(**{"a\n\x1b[2J": np.ones(1)}), r"no place for tensor 'a\\n\\x1b\[2J' in the"),
    (
        as_type(np.int64),
        r"tensor model\.norm\.weight is stored as I64; weights must be of F64, F32",
    ),
    (as_type(bool), r"tensor model\.norm\.weight is stored as BOOL; weights must be of"),
    (in_float8, r"tensor model\.norm\.weight is stored as F8_E4M3; weights must be of"),
    (tensors(**{NORM: np.full(32, 1e300)}), r"model\.norm\.weight holds numbers .* not finite"),
    (tensors(**{NORM: np.full(32, np.nan)}), r"model\.norm\.weight holds numbers .* not finite"),
    (tensors(**{NORM: np.ones(())}), r"model\.norm\.weight has shape \(\), but"),
    (index("{}"), r"model\.safetensors\.index\.json has no weight_map"),
    (
        index('{"weight_map": {"a": "b.safetensors"}}'),
        r"b\.safetensors: no such file; download",
    ),
    (index('{"weight_map": {"a": "../model/model-1.safetensors"}}'), r"no file of its folder"),
    (index('{"weight_map": {"a": "/etc/passwd"}}'), r"'/etc/passwd', which is no file of its"),
    (index('{"weight_map": {"a": ".."}}'), r"\.\. is a folder; it must be a file"),
    (index('{"weight_map": {"a": "\\u0000"}}'), r"names '\\x00', which is no file"),
    (index('{"weight_map": {"a": ["model-1.safetensors"]}}'), r"names \['model-1.* no file"),
    (in_two_shards, r"'model\.norm\.weight' is in .*-1\.safetensors and in .*-2\.safetensors"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS, ids=lambda x: getattr(x, "__name__", x))
def test_bad_folders(spoil, message, model_folder):
    """A sentence, and no array is made that the file does not hold."""
    spoil(model_folder)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message) as caught:
            load_pretrained(model_folder)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert str(model_folder) in str(caught.value)  # the place
    assert str(caught.value).endswith(".")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        tensors(model__layers__1__self_attn__rotary_emb__inv_freq=np.ones(4)),  # transformers 4.30
        tensors(**{NORM: np.ones(32)}),  # of float64
        index(
            '{"weight_map": {"a": "model-1.safetensors"}, "metadata": {}}'
        ),  # its files say what they hold
    ],
)
def test_odd_folders_that_are_read_as_transformers_does(
    change, model_folder, torch_logits, outputs, ragged
):
    change(model_folder)
    theirs = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids, mask = ragged()
    logits, _ = outputs(load_pretrained(model_folder), ids, mask)
    expected = torch_logits(theirs, ids, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-5)


def test_a_llama_has_no_biases_to_load(torch_model, tmp_path):
    """transformers passes over them; a file that has some is of another model."""
    torch_model("LlamaForCausalLM").save_pretrained(tmp_path)
    tensors(model__layers__0__self_attn__q_proj__bias=np.ones(32, np.float32))(tmp_path)
    with pytest.raises(
        UsageError, match=r"no place for tensor 'model\.layers\.0\.\S+q_proj\.bias'"
    ):
        load_pretrained(tmp_path)


@pytest.fixture(scope="module")
def sharded(torch_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch_model().save_pretrained(folder, max_shard_size="20KB")
    return folder


def loads_or_says_why(folder):
    try:
        load_pretrained(folder)
    except UsageError as error:
        assert str(error).endswith(".")
        assert str(error).isprintable()


FUZZED = settings(max_examples=60, deadline=None)
odd_values = st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=3))


@FUZZED
@given(st.dictionaries(st.text(max_size=8), odd_values, max_size=3), odd_values)
def test_any_index_is_a_model_or_a_sentence(sharded, weight_map, instead):
    path = sharded / "model.safetensors.index.json"
    original = path.read_text()
    changed = json.loads(original)
    changed["weight_map"] |= weight_map
    try:
        for content in (changed, {"weight_map": weight_map}, {"weight_map": instead}, instead):
            path.write_text(json.dumps(content))
            loads_or_says_why(sharded)
    finally:
        path.write_text(original)


@FUZZED
@given(st.data())
def test_damaged_weights_are_a_model_or_a_sentence(sharded, data):
    """Bytes of the header are changed: of names, types, shapes and places."""
    path = min(sharded.glob("model-00002-of-*.safetensors"))
    original = path.read_bytes()
    [size] = struct.unpack("<Q", original[:8])
    damaged = bytearray(original)
    for place in data.draw(st.lists(st.integers(0, 7 + size), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), 8 + size, 20]))])
    try:
        loads_or_says_why(sharded)
    finally:
        path.write_bytes(original)


def test_a_folder_that_is_replaced_meanwhile_is_read_whole(model_folder, monkeypatch):
    """By a run that goes on: each version has one number in its policy and in its value head."""
    network = load_pretrained(model_folder)

    def write(number):
        network.backbone.norm.weight[...] = jnp.full(32, float(number))
        network.value_head.bias[...] = jnp.array([float(number)])
        save_pretrained(network, model_folder)

    write(0)
    read, reads = SafetensorsFolder.read, []

    def read_and_replace(self, name, out):
        reads.append(name)
        if len(reads) in (1, 3, 20):  # twice in the first attempt, then in the second
            write(len(reads))
        read(self, name, out)

    monkeypatch.setattr(SafetensorsFolder, "read", read_and_replace)
    loaded = load_pretrained(model_folder)
    assert loaded.value_head.bias[0] == loaded.backbone.norm.weight[0] == 20.0


@pytest.mark.parametrize("name", ["./no/such", Path("no/such"), "/no/such/folder"])
def test_no_such_folder(name):
    for load in (load_pretrained, load_reward_model):
        with pytest.raises(UsageError, match=r"no/such.*: no such folder\."):
            load(name)


def test_hub_ids_without_a_hub(model_folder, tmp_path):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    repository = tmp_path / "cache" / "models--tiny-org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = """
from ppo_jax.models import load_pretrained
print(load_pretrained("tiny-org/tiny").config.hidden_size)
try:
    load_pretrained("tiny-org/another")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    cached, unreachable = done.stdout.splitlines()
    assert cached == "32"
    assert "tiny-org/another: no such folder, and the Hugging Face hub cannot be reached" in (
        unreachable
    )
    assert ".gguf" in unreachable
