from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from flax import nnx

from ppo_jax.generation.reward_models import FlaxReward, WithGold, load_training_reward
from ppo_jax.models import DecoderConfig, RewardModel, save_reward_model
from qwen_env.errors import UsageError
from qwen_env.pocket.grammar import sentiment
from qwen_env.rewards import RewardBatch, RewardError, score
from qwen_env.tokenizer import Tokenizer

TEXTS = [
    ("The plot", " was fine."),
    ("I liked", " it, and the songs were not bad at all."),
    ("A", ""),
]


@pytest.fixture(scope="module")
def make_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> Callable[..., Path]:
    """Saves a random reward model, by default on the pocket vocabulary."""

    def make(**changes: int) -> Path:
        sizes = {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
        folder = tmp_path_factory.mktemp("reward")
        model = RewardModel(DecoderConfig(**(sizes | changes)), rngs=nnx.Rngs(3))
        save_reward_model(model, folder, tokenizer)
        return folder

    return make


@pytest.fixture(scope="module")
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder()


def batch(tokenizer: Tokenizer, texts: Any = TEXTS) -> RewardBatch:
    eos = tokenizer.eos_token_ids[0]
    return RewardBatch(
        prompts=[prompt for prompt, _ in texts],
        completions=[completion for _, completion in texts],
        prompt_ids=[np.array(tokenizer.encode(prompt), np.int32) for prompt, _ in texts],
        completion_ids=[np.array([*tokenizer.encode(c), eos], np.int32) for _, c in texts],
        rows=[{} for _ in texts],
        finish_reasons=["eos"] * len(texts),
    )


def by_transformers(folder: Path, sequences: list[list[int]]) -> list[float]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    # Where the padding token is the end-of-sequence token, transformers would overlook the latter.
    model.config.pad_token_id = None
    with torch.no_grad():
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in sequences]


def test_flax_reward_reads_the_tokens_as_they_were_chosen(
    folder: Path, tokenizer: Tokenizer
) -> None:
    episodes = batch(tokenizer)
    pairs = zip(episodes.prompt_ids, episodes.completion_ids, strict=True)
    expected = by_transformers(folder, [[*prompt, *completion] for prompt, completion in pairs])
    scores = FlaxReward(str(folder), tokenizer)(episodes)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.fixture(scope="module")
def of_words() -> Tokenizer:
    """A policy's tokenizer that has nothing in common with the reward model's."""
    words = {"<eos>": 0, "The": 1, "plot": 2, "was": 3, "fine": 4, ".": 5, "?": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend, eos_token_ids=(0,))


def test_flax_reward_with_another_vocabulary_reads_the_text(
    folder: Path, tokenizer: Tokenizer, of_words: Tokenizer
) -> None:
    """And where the policy ended it, the model's own end-of-sequence token."""
    ends = {"eos": [tokenizer.eos_token_ids[0]], "length": []}
    reasons = ["eos", "length", "eos"]
    rows = zip(TEXTS, reasons, strict=True)
    expected = by_transformers(folder, [tokenizer.encode(p + c) + ends[r] for (p, c), r in rows])
    episodes = replace(batch(of_words), finish_reasons=reasons)
    scores = FlaxReward(str(folder), of_words)(episodes)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("shares_vocabulary", [True, False])
def test_transformers_and_our_port_give_one_model_the_same_score(
    folder: Path, tokenizer: Tokenizer, of_words: Tokenizer, shares_vocabulary: bool
) -> None:
    policy = tokenizer if shares_vocabulary else of_words
    finished = batch(policy)
    without_end = [ids[:-1] for ids in finished.completion_ids]
    cut_off = replace(
        finished,
        completion_ids=without_end,
        response_ids=without_end,
        finish_reasons=["length"] * len(finished),
    )
    ours, theirs = (load_training_reward(f"{form}:{folder}", policy) for form in ("flax", "hf"))
    for episodes in (finished, cut_off):
        scores = score(ours, episodes).values
        np.testing.assert_allclose(scores, score(theirs, episodes).values, atol=1e-4)
    assert np.abs(scores - score(ours, finished).values).min() > 1e-3


def test_a_run_is_its_last_model(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl"):
        run.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    with pytest.raises(UsageError, match=f"The run in {run} has saved no model yet"):
        load_training_reward(f"flax:{run}", tokenizer)
    (run / "final").symlink_to(folder)
    ours, theirs = (FlaxReward(str(place), tokenizer) for place in (run, folder))
    episodes = batch(tokenizer)
    np.testing.assert_array_equal(ours(episodes), theirs(episodes))


def test_a_tokenizer_with_more_ids_than_the_model_has(
    make_folder: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    """JAX would read another row of the embedding, and say nothing."""
    size = tokenizer.vocab_size
    folder = make_folder(vocab_size=size - 1)
    with pytest.raises(UsageError, match=f"{folder}: the tokenizer has {size} ids, but the model"):
        FlaxReward(str(folder), tokenizer)


def test_a_row_beyond_the_model_s_positions(
    make_folder: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    episodes = batch(tokenizer)
    longest = len(episodes.prompt_ids[1]) + len(episodes.completion_ids[1])
    score(FlaxReward(str(make_folder(max_position_embeddings=longest)), tokenizer), episodes)
    short = make_folder(max_position_embeddings=longest - 1)
    with pytest.raises(
        RewardError,
        match=rf"flax:{short} has {longest - 1} positions, but row 1 \(prompt 'I liked'\) comes "
        rf"to {longest} tokens; lower max_new_tokens",
    ):
        score(FlaxReward(str(short), tokenizer), episodes)


def test_a_row_scores_the_same_in_any_company(folder: Path, tokenizer: Tokenizer) -> None:
    reward = FlaxReward(str(folder), tokenizer)
    together = reward(batch(tokenizer))
    alone = [reward(batch(tokenizer, [text]))[0] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_gold_is_reported_and_not_paid(
    folder: Path, tokenizer: Tokenizer, rewards: ModuleType
) -> None:
    reward = load_training_reward(
        f"flax:{folder}", tokenizer, "qwen_env.rewards.sentiment:pocket_sentiment"
    )
    scores = score(reward, batch(tokenizer))
    plain = FlaxReward(str(folder), tokenizer)(batch(tokenizer))
    np.testing.assert_array_equal(scores.values, plain)
    assert list(scores.components) == ["gold"]
    expected = [sentiment(prompt + completion) for prompt, completion in TEXTS]
    np.testing.assert_allclose(scores.components["gold"], expected)


def test_two_golds_are_one_too_many(tokenizer: Tokenizer, rewards: ModuleType) -> None:
    reward = WithGold(rewards.count_e, rewards.count_e)
    with pytest.raises(RewardError, match=r"^The reward already has a component named 'gold'; le"):
        score(reward, batch(tokenizer))


def test_the_failing_one_of_two_is_named(tokenizer: Tokenizer, rewards: ModuleType) -> None:
    rewards.on_call = {1: lambda batch: np.full(len(batch), np.nan)}
    reward = load_training_reward(
        "qwen_env.rewards.sentiment:pocket_sentiment", tokenizer, "rewards_of_tests:scripted"
    )
    with pytest.raises(RewardError, match=r"rewards_of_tests\.scripted returned nan for row 0"):
        score(reward, batch(tokenizer))


def test_a_preset_without_a_reward_says_so(tokenizer):
    with pytest.raises(UsageError, match="There is no reward; name one"):
        load_training_reward("", tokenizer)


def test_a_reward_model_in_a_weighted_sum(folder: Path, tokenizer: Tokenizer) -> None:
    spec = f"2.0 * flax:{folder} + -1 * qwen_env.rewards.sentiment:pocket_sentiment"
    episodes = batch(tokenizer)
    total = score(load_training_reward(spec, tokenizer), episodes)
    model = score(FlaxReward(str(folder), tokenizer), episodes).values
    gold = np.array([sentiment(prompt + completion) for prompt, completion in TEXTS])
    np.testing.assert_allclose(total.values, 2 * model - gold, atol=1e-6)
    np.testing.assert_allclose(total.components[folder.name], model)
