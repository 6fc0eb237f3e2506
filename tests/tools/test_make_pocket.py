"""A tiny run of the command that makes the pocket task's files."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import make_pocket
import numpy as np
import pytest
from flax import nnx

from ppo_jax.models import DecoderConfig, PolicyValueNetwork, load_pretrained, load_reward_model
from qwen_env.errors import UsageError
from qwen_env.pocket import corpus, grammar
from qwen_env.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return corpus.train_tokenizer(corpus.reviews(np.random.default_rng(0), 2000))


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> DecoderConfig:
    """One narrow layer in the place of MODEL."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config = dataclasses.replace(make_pocket.MODEL, **sizes)
    monkeypatch.setattr(make_pocket, "MODEL", config)
    monkeypatch.setattr(make_pocket, "SAMPLE_BATCH", 32)
    return config


def test_the_better_of_two_samples_wins_more_often() -> None:
    good, bad = "I loved the music.", "The plot was dull."
    assert grammar.sentiment(good) > 0 > grammar.sentiment(bad)
    settings = make_pocket.Settings(preference_beta=4.0)
    pairs = make_pocket.compared(settings, [good, bad, good], 2000, np.random.default_rng(0))
    assert len(pairs) == 2000
    assert all({pair["chosen"], pair["rejected"]} == {good, bad} for pair in pairs)
    chance = 1 / (1 + np.exp(-4.0 * (grammar.sentiment(good) - grammar.sentiment(bad))))
    share = np.mean([pair["chosen"] == good for pair in pairs])
    assert share == pytest.approx(chance, abs=0.03)


@pytest.mark.slow
def test_a_tiny_run_learns_and_writes_folders_that_load(
    small_model: DecoderConfig, tmp_path: Path
) -> None:
    settings = make_pocket.Settings(
        output_dir=tmp_path / "pocket",
        tokenizer_reviews=2000,
        num_train_prompts=40,
        num_heldout_prompts=10,
        policy_steps=30,
        policy_batch=16,
        policy_learning_rate=1e-2,
        reward_samples=64,
        reward_steps=3,
        reward_batch=8,
        report_samples=64,
    )
    report = make_pocket.run(settings)
    assert report["policy/cross_entropy_floor"] < report["policy/cross_entropy"] < 5.0 < np.log(768)
    assert 0 <= report["reward/pair_accuracy"] <= 1

    folder = settings.output_dir
    prompts = [
        json.loads(line)["prompt"]
        for name in ("train", "heldout")
        for line in (folder / f"{name}_prompts.jsonl").read_text().splitlines()
    ]
    assert len(set(prompts)) == 50
    tokenizer = load_tokenizer(folder / "policy")
    texts = make_pocket.encode(tokenizer, prompts)
    logits, _ = load_pretrained(folder / "policy")(texts.ids, texts.mask)
    assert logits.shape == (50, 36, 768)
    scores = load_reward_model(folder / "reward")(texts.ids, texts.mask)
    assert np.isfinite(scores).all()
    assert {path.name for path in folder.iterdir()} == {
        "policy",
        "reward",
        "train_prompts.jsonl",
        "heldout_prompts.jsonl",
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("policy_steps", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("preference_beta", float("nan"), "above 0 and finite"),
        ("reward_learning_rate", 0.0, "above 0 and finite"),
    ],
)
def test_settings_out_of_range(name: str, value: float, words: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}; it must be {words}"):
        make_pocket.Settings(**{name: value})


def test_texts_are_padded_behind_their_end(tokenizer: Tokenizer) -> None:
    texts = make_pocket.encode(tokenizer, ["I loved the music.", "Although"])
    ended = [*tokenizer.encode("I loved the music."), corpus.EOS_ID]
    assert texts.ids[0, : len(ended)].tolist() == ended
    lengths = [len(ended), len(tokenizer.encode("Although")) + 1]
    assert texts.mask.sum(axis=1).tolist() == lengths


@pytest.mark.slow
def test_samples_continue_their_prompts(small_model: DecoderConfig, tokenizer: Tokenizer) -> None:
    policy = PolicyValueNetwork(small_model, rngs=nnx.Rngs(0))
    prompts = ["Although the plot", "It was a"]
    key = jax.random.key(0)
    samples = make_pocket.draw_samples(policy, tokenizer, prompts, 5, key)
    assert len(set(samples)) == 6
    for i, sample in enumerate(samples):
        assert sample.startswith(prompts[i // 3])
        assert grammar.sentiment(sample) == grammar.OFF_GRAMMAR  # an untrained policy babbles


def test_help_explains_every_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        make_pocket.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(make_pocket.Settings):
        flag = field.name.replace("_", "-")
        assert re.search(rf"--{flag} [A-Z]+ (?!\()[^(]+ \(default: ", text), flag
    assert "--reward-steps INT Optimizer steps of the reward model. (default: 1000)" in text
