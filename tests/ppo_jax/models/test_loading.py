"""Folders of transformers in, folders for transformers out, and all the ways to be wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ppo_jax.models import (
    Qwen2Config,
    huggingface,
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from qwen_env.errors import UsageError
from qwen_env.tokenizer import Tokenizer, load_tokenizer


def edit_json(path, **changes):
    """Set fields; a field set to None is removed."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


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

    def test_a_llama_is_a_qwen2_with_zero_biases(
        self, torch_model, torch_logits, outputs, ragged, tmp_path
    ):
        theirs = torch_model("LlamaForCausalLM", tie_word_embeddings=False)
        theirs.save_pretrained(tmp_path / "llama")
        network = load_pretrained(tmp_path / "llama")
        ids, mask = ragged()
        logits, _ = outputs(network, ids, mask)
        expected = torch_logits(theirs, ids, mask)[mask]
        np.testing.assert_allclose(logits[mask], expected, rtol=0, atol=1e-5)

        save_pretrained(network, tmp_path / "qwen2")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")
        assert again.config.model_type == "qwen2"
        np.testing.assert_allclose(
            torch_logits(again, ids, mask)[mask], expected, rtol=0, atol=1e-5
        )

    def test_the_config_of_transformers_4(self, model_folder):
        expected = load_pretrained(model_folder).config
        assert expected.rope_theta == 500.0
        edit_json(
            model_folder / "config.json", rope_parameters=None, rope_theta=500.0, head_dim=None
        )
        assert load_pretrained(model_folder).config == expected

    def test_our_config_is_read_alike_by_transformers(self, torch_model, tmp_path):
        theirs = torch_model(head_dim=20, num_key_value_heads=1).config
        theirs.save_pretrained(tmp_path)
        ours = Qwen2Config.from_huggingface(json.loads((tmp_path / "config.json").read_text()))
        (tmp_path / "config.json").write_text(json.dumps(ours.to_huggingface()))
        again = AutoConfig.from_pretrained(tmp_path)
        for name in ours.to_huggingface().keys() - {"rope_theta", "architectures"}:
            assert getattr(again, name) == getattr(theirs, name), name
        assert again.rope_parameters == theirs.rope_parameters

    def test_one_file_wins_over_an_index_as_in_transformers(self, model_folder):
        (model_folder / "model.safetensors.index.json").write_text("{}")
        load_pretrained(model_folder)

    def test_the_config_decides_whether_the_head_is_tied(self, model_folder, outputs, ragged):
        logits, _ = outputs(load_pretrained(model_folder), *ragged())
        edit_tensors(
            model_folder / "model.safetensors",
            lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}),
        )
        with_head, _ = outputs(load_pretrained(model_folder), *ragged())
        np.testing.assert_array_equal(logits, with_head)

    def test_a_home_directory_is_expanded(self, model_folder, monkeypatch):
        monkeypatch.setenv("HOME", str(model_folder.parent))
        load_pretrained("~/model")


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
        ],
    )
    def test_of_another_model(self, head, message, folder):
        save_file(head, folder / "value_head.safetensors")
        with pytest.raises(UsageError, match=message):
            load_pretrained(folder)

    def test_cut_short(self, folder):
        path = folder / "value_head.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(UsageError, match=r"value_head.safetensors is not a readable"):
            load_pretrained(folder)


class TestRewardModel:
    @pytest.mark.parametrize("tied", [True, False])
    def test_parity_both_ways(self, tied, torch_model, outputs, ragged, tmp_path):
        theirs = torch_model(
            "Qwen2ForSequenceClassification", num_labels=1, tie_word_embeddings=tied
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

    def test_with_two_labels(self, torch_model, tmp_path):
        theirs = torch_model("Qwen2ForSequenceClassification", num_labels=2)
        theirs.save_pretrained(tmp_path)
        with pytest.raises(UsageError, match=r"score.weight has shape \(2, 32\).* is \(1, 32\)"):
            load_reward_model(tmp_path)

    def test_that_is_a_language_model(self, model_folder):
        with pytest.raises(UsageError, match=r"tensor score\.weight is missing"):
            load_reward_model(model_folder)


class TestSaving:
    def test_replaces_an_older_model_whole(self, torch_model, model_folder, tmp_path):
        torch_model().save_pretrained(tmp_path / "old", max_shard_size="20KB")
        network = load_pretrained(model_folder)
        save_pretrained(network, tmp_path / "old")
        assert sorted(path.name for path in (tmp_path / "old").iterdir()) == [
            "config.json",
            "model.safetensors",
            "value_head.safetensors",
        ]
        assert_same(load_pretrained(tmp_path / "old"), network)

    def test_makes_parents_and_readable_files(self, model_folder, tmp_path):
        folder = tmp_path / "runs" / "x" / "final"
        umask = os.umask(0o022)
        try:
            save_pretrained(load_pretrained(model_folder), folder)
        finally:
            os.umask(umask)
        assert folder.stat().st_mode & 0o777 == 0o755
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}

    def test_with_a_tokenizer(self, model_folder, tmp_path):
        backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "<turn>": 3}))
        tokenizer = Tokenizer(
            backend, eos_token_ids=(2, 3), config={"eos_token": "<end>", "pad_token": "<end>"}
        )
        save_pretrained(load_pretrained(model_folder), tmp_path / "saved", tokenizer)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert theirs.generation_config.eos_token_id == [2, 3]
        assert theirs.generation_config.pad_token_id == theirs.config.pad_token_id == 2
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<end>"
        assert load_tokenizer(tmp_path / "saved").eos_token_ids == (2, 3)

    def test_with_a_tokenizer_that_names_no_end(self, model_folder, tmp_path):
        tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0})))
        save_pretrained(load_pretrained(model_folder), tmp_path / "saved", tokenizer)
        assert load_tokenizer(tmp_path / "saved").eos_token_ids == ()

    def test_into_the_current_directory(self, model_folder, monkeypatch):
        network = load_pretrained(model_folder)
        monkeypatch.chdir(model_folder)
        save_pretrained(network, ".")
        assert_same(load_pretrained(model_folder), network)

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize(
        "at", ["model.safetensors", "value_head.safetensors", "the last rename"]
    )
    def test_an_interrupted_save_leaves_the_old_folder_whole(
        self, error, at, model_folder, monkeypatch
    ):
        network = load_pretrained(model_folder)
        before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
        network.value_head.bias[...] = jnp.array([3.0])
        save, rename = huggingface.save_file, Path.rename

        def failing_save(tensors, path, **options):
            save(tensors, path, **options)
            if path.name == at:
                raise error

        def failing_rename(self, target):
            if self.name == "new":
                raise error
            return rename(self, target)

        monkeypatch.setattr(huggingface, "save_file", failing_save)
        if at == "the last rename":
            monkeypatch.setattr(Path, "rename", failing_rename)
        # A full disk becomes a sentence where the files are written.
        with pytest.raises((type(error), UsageError)):
            save_pretrained(network, model_folder)
        assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
        assert [path.name for path in model_folder.parent.iterdir()] == ["model"]  # no leftovers

    def test_never_replaces_what_is_not_a_model(self, model_folder, tmp_path):
        network = load_pretrained(model_folder)
        home = tmp_path / "home"
        home.mkdir()
        save_pretrained(network, home)  # empty: nothing to lose
        (home / "config.json").unlink()
        with pytest.raises(UsageError, match="home holds something that is not a model"):
            save_pretrained(network, home)
        with pytest.raises(UsageError, match=r"model\.safetensors is a file"):
            save_pretrained(network, home / "model.safetensors")
        assert (home / "model.safetensors").is_file()


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


BAD_FOLDERS = [
    (no_config, r"model has no config\.json; a model is a folder"),
    (broken_json, r"config\.json is not valid JSON: .*line 1 column"),
    (json_list, r"config\.json holds a list; it must hold an object"),
    (
        config(model_type="gpt2"),
        r"config\.json describes a model of type 'gpt2'; .*qwen2 and llama",
    ),
    (config(model_type=None), r"describes a model of type None"),
    (
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}),
        r"config\.json sets the RoPE type to 'yarn'; this port computes only 'default'",
    ),
    (config(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), r"to 'linear'"),
    (config(partial_rotary_factor=0.5), r"sets partial_rotary_factor to 0\.5"),
    (config(use_sliding_window=True), r"sets use_sliding_window to True"),
    (config(hidden_act="gelu"), r"sets hidden_act to 'gelu'"),
    (config(mlp_bias=True), r"sets mlp_bias to True"),
    (config(attention_bias=True), r"sets attention_bias to True"),
    (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"sets the quantization method to 'gptq'",
    ),
    (config(hidden_size=None), r"config\.json has no field 'hidden_size'"),
    (config(vocab_size="many"), r"sets vocab_size to 'many'; it must be a positive number"),
    (config(num_hidden_layers=0), r"sets num_hidden_layers to 0; it must be a positive number"),
    (config(num_hidden_layers=1.5), r"sets num_hidden_layers to 1\.5; it must be an integer"),
    (config(num_key_value_heads=3), r"config\.json: num_attention_heads \(4\) must be a multiple"),
    (config(head_dim=7), r"config\.json: head_dim is 7; rotary positions need an even number"),
    (only_pickle, r"no model\.safetensors, only pytorch_model\.bin, and pickled .* never loaded"),
    (no_weights, r"model has no model\.safetensors; save the model with"),
    (truncated, r"model\.safetensors is not a readable safetensors file"),
    (not_safetensors, r"model\.safetensors is not a readable safetensors file"),
    (missing_tensor, r"tensor model\.layers\.1\.self_attn\.k_proj\.bias is missing"),
    (
        wrong_shape,
        r"layers\.2\.mlp\.up_proj\.weight has shape \(64, 30\).*config\.json it is \(64, 32\)",
    ),
    (config(num_hidden_layers=4), r"tensor model\.layers\.3\..* is missing"),
    (config(tie_word_embeddings=False), r"tensor lm_head\.weight is missing"),
    (index("{}"), r"model\.safetensors\.index\.json has no weight_map"),
    (index('{"weight_map": {"a": "b.safetensors"}}'), r"b\.safetensors is not a readable"),
    (
        index('{"weight_map": {"a": "model-1.safetensors"}, "model_type": 1}'),
        None,  # the files themselves say which tensors they hold
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS)
def test_bad_folders(spoil, message, model_folder):
    spoil(model_folder)
    if message is None:
        load_pretrained(model_folder)
        return
    with pytest.raises(UsageError, match=message) as caught:
        load_pretrained(model_folder)
    assert str(model_folder) in str(caught.value)  # the place
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


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
