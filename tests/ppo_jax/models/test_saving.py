"""Models to folders: what is written, what others make of it, and what is replaced when."""

import json
import os
from pathlib import Path

import chex
import jax.numpy as jnp
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import models
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_jax.models import Generation, load_pretrained, safetensors_folder, save_pretrained
from ppo_jax.sampling import Sampling
from qwen_env.errors import RunError, UsageError
from qwen_env.tokenizer import Tokenizer, load_tokenizer


def assert_same(a, b):
    chex.assert_trees_all_equal(nnx.state(a), nnx.state(b))


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "LlamaForCausalLM"])
def test_a_model_is_written_back_as_what_it_was(name, torch_model, tmp_path):
    """To the last bit, under its own model_type and with no tensor more or less."""
    theirs = torch_model(name, tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert type(again) is type(theirs)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    chex.assert_trees_all_equal(after, before)


def test_beside_the_weights_there_is_nothing_that_is_none(model_folder):
    """Some loaders, vLLM's among them, take every *.safetensors of a folder for weights."""
    save_pretrained(load_pretrained(model_folder), model_folder)
    assert [path.name for path in model_folder.glob("*.safetensors")] == ["model.safetensors"]
    assert load_file(model_folder / "critic" / "value_head.safetensors").keys() == {
        "weight",
        "bias",
    }


def test_replaces_an_older_model_whole(torch_model, model_folder, tmp_path):
    torch_model().save_pretrained(tmp_path / "old", max_shard_size="20KB")
    network = load_pretrained(model_folder)
    save_pretrained(network, tmp_path / "old")
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == [
        "config.json",
        "critic",
        "model.safetensors",
    ]
    assert_same(load_pretrained(tmp_path / "old"), network)


def test_makes_parents_and_readable_files(model_folder, tmp_path):
    folder = tmp_path / "runs" / "x" / "final"
    umask = os.umask(0o022)
    try:
        save_pretrained(load_pretrained(model_folder), folder)
    finally:
        os.umask(umask)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert modes == {True: 0o755, False: 0o644}


@pytest.fixture
def tokenizer():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "<turn>": 3}))
    return Tokenizer(
        backend, eos_token_ids=(2, 3), config={"eos_token": "<end>", "pad_token": "<end>"}
    )


def test_with_a_tokenizer(tokenizer, model_folder, tmp_path):
    save_pretrained(load_pretrained(model_folder), tmp_path / "saved", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert theirs.generation_config.eos_token_id == [2, 3]
    assert theirs.generation_config.pad_token_id == theirs.config.pad_token_id == 2
    assert not theirs.generation_config.do_sample
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<end>"
    assert load_tokenizer(tmp_path / "saved").eos_token_ids == (2, 3)


def test_with_a_tokenizer_that_names_no_end(model_folder, tmp_path):
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0})))
    save_pretrained(load_pretrained(model_folder), tmp_path / "saved", tokenizer)
    assert load_tokenizer(tmp_path / "saved").eos_token_ids == ()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        (Sampling(0.7, 20, 0.8), {"temperature": 0.7, "top_k": 20, "top_p": 0.8}),
    ],
)
def test_others_draw_tokens_as_the_policy_does(
    sampling, expected, tokenizer, model_folder, tmp_path
):
    """0 and 1.0 mean "not used"; left out, transformers and vLLM would use values of their own."""
    network = load_pretrained(model_folder)
    generation = Generation(*sampling, max_new_tokens=12)
    save_pretrained(network, tmp_path / "saved", tokenizer, generation=generation)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert theirs.do_sample
    assert theirs.max_new_tokens == 12
    assert {name: getattr(theirs, name) for name in expected} == expected
    assert theirs.eos_token_id == [2, 3]

    save_pretrained(network, tmp_path / "bare", generation=Generation(*sampling))
    written = json.loads((tmp_path / "bare" / "generation_config.json").read_text())
    assert written == {"do_sample": True, **expected}


def test_into_the_current_directory(model_folder, monkeypatch):
    network = load_pretrained(model_folder)
    monkeypatch.chdir(model_folder)
    save_pretrained(network, ".")
    assert_same(load_pretrained(model_folder), network)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["model.safetensors", "value_head.safetensors"])
def test_an_interrupted_save_leaves_the_old_folder_whole(error, at, model_folder, monkeypatch):
    network = load_pretrained(model_folder)
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    network.value_head.bias[...] = jnp.array([3.0])
    save = safetensors_folder.save_file

    def failing_save(tensors, path, **options):
        save(tensors, path, **options)
        if path.name == at:
            raise error

    monkeypatch.setattr(safetensors_folder, "save_file", failing_save)
    # A full disk becomes a sentence where the files are written.
    with pytest.raises((type(error), RunError)):
        save_pretrained(network, model_folder)
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
    assert [path.name for path in model_folder.parent.iterdir()] == ["model"]  # no leftovers


def test_never_replaces_what_is_not_a_model(model_folder, tmp_path):
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


def test_a_model_named_by_a_link_is_replaced_where_it_is(model_folder, tmp_path):
    network = load_pretrained(model_folder)
    (tmp_path / "link").symlink_to(model_folder)
    save_pretrained(network, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (model_folder / "critic").is_dir()
    assert Path(model_folder).exists()
