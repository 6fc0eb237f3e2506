"""The shipped files, read by the libraries that users will read them with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_env import pocket
from qwen_env.pocket import corpus, grammar
from qwen_env.tokenizer import Tokenizer, load_tokenizer

FOLDER = pocket.POLICY_FOLDER.parent


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(pocket.POLICY_FOLDER)


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    with torch.inference_mode():
        yield transformers


def prompts_of(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_prompts_are_distinct_and_disjoint() -> None:
    train, heldout = prompts_of(pocket.TRAIN_PROMPTS), prompts_of(pocket.HELDOUT_PROMPTS)
    assert (len(train), len(heldout)) == (512, 128)
    assert len(set(train) | set(heldout)) == 640


@pytest.mark.parametrize("path", [pocket.TRAIN_PROMPTS, pocket.HELDOUT_PROMPTS])
def test_prompts_are_short_and_leave_the_sentiment_open(path: Path, tokenizer: Tokenizer) -> None:
    for prompt in prompts_of(path):
        assert 1 < len(prompt.split()) <= 7
        assert len(tokenizer.encode(prompt)) <= pocket.MAX_PROMPT_LENGTH
        assert grammar.meaning(prompt).start == len(prompt), prompt


def test_the_tokens_of_a_prompt_begin_the_tokens_of_its_review(tokenizer: Tokenizer) -> None:
    """Else a policy that was trained on whole reviews would not know its prompts."""
    for review in corpus.reviews(np.random.default_rng(0), 500):
        ids = tokenizer.encode(review)
        words = review.split()
        for count in range(1, len(words)):
            start = tokenizer.encode(" ".join(words[:count]))
            assert ids[: len(start)] == start


def test_reviews_end_within_the_limits(tokenizer: Tokenizer) -> None:
    fewest_words = corpus.PROMPT_WORDS[0]
    excess = 0
    for review in corpus.reviews(np.random.default_rng(0), 2000):
        prompt = " ".join(review.split()[:fewest_words])
        new_tokens = len(tokenizer.encode(review)) - len(tokenizer.encode(prompt)) + 1  # and eos
        excess += new_tokens > pocket.MAX_NEW_TOKENS
    assert excess <= 4


@settings(max_examples=50)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer(pocket.POLICY_FOLDER)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(corpus.EOS, "")


def test_transformers_loads_the_same_tokenizer(tokenizer: Tokenizer, transformers: Any) -> None:
    reviews = corpus.reviews(np.random.default_rng(0), 50)
    for folder in (pocket.POLICY_FOLDER, pocket.REWARD_FOLDER):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert (theirs.eos_token_id, theirs.pad_token_id) == (corpus.EOS_ID, corpus.EOS_ID)
        assert len(theirs) == tokenizer.vocab_size <= corpus.VOCAB_SIZE
        for review in reviews:
            assert theirs(review).input_ids == tokenizer.encode(review)
            assert theirs.decode(theirs(review).input_ids) == review
    assert tokenizer.eos_token_ids == (corpus.EOS_ID,)
    assert tokenizer.pad_token_id == corpus.EOS_ID


@pytest.mark.slow
def test_transformers_writes_reviews_with_the_policy(
    tokenizer: Tokenizer, transformers: Any
) -> None:
    import torch

    policy = transformers.AutoModelForCausalLM.from_pretrained(pocket.POLICY_FOLDER)
    theirs = transformers.AutoTokenizer.from_pretrained(pocket.POLICY_FOLDER, padding_side="left")
    prompts = prompts_of(pocket.HELDOUT_PROMPTS)[:100]
    torch.manual_seed(0)
    written = policy.generate(
        **theirs(prompts, padding=True, return_tensors="pt"),
        do_sample=True,
        top_k=0,
        max_new_tokens=pocket.MAX_NEW_TOKENS,
    )
    texts = [tokenizer.decode(row.tolist()) for row in written]
    gold = np.array([grammar.sentiment(text) for text in texts if grammar.is_grammatical(text)])
    assert len(gold) >= 88  # 96 in the mean
    assert abs(gold.mean()) < 0.2  # neither a friend nor a foe of films yet
    assert len(set(texts)) > 90


def test_transformers_scores_reviews_with_the_reward_model(transformers: Any) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pocket.REWARD_FOLDER)
    theirs = transformers.AutoTokenizer.from_pretrained(pocket.REWARD_FOLDER)
    reviews = corpus.reviews(np.random.default_rng(1), 200)
    scores = model(**theirs(reviews, padding=True, return_tensors="pt")).logits[:, 0].numpy()
    gold = np.array([grammar.sentiment(text) for text in reviews])
    assert np.corrcoef(gold, scores)[0, 1] > 0.9
    assert 0.7 < scores.std() < 1.3
    assert abs(scores.mean()) < 0.3


def test_the_files_are_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert max(path.stat().st_size for path in files) < 4e6
