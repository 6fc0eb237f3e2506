"""What the pocket task's files are made from: reviews, their tokenizer, and prompts."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qwen_env.errors import UsageError
from qwen_env.pocket import MAX_PROMPT_LENGTH, grammar
from qwen_env.tokenizer import Tokenizer

EOS = "<|endoftext|>"
EOS_ID = 0  # special tokens come first; it is the padding as well
VOCAB_SIZE = 768  # of the models; the tokenizer runs out of merges earlier, at about 710
PROMPT_WORDS = (2, 7)
_OPENING_TRIES = 100  # for each prompt


def reviews(rng: np.random.Generator, count: int) -> list[str]:
    """`count` reviews; the same may come twice."""
    return [grammar.sample(rng) for _ in range(count)]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: any text can be encoded, and nearly every word of a review is one token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    config = {"eos_token": EOS, "pad_token": EOS, "clean_up_tokenization_spaces": False}
    return Tokenizer(backend, eos_token_ids=(EOS_ID,), config=config)


def openings(rng: np.random.Generator, tokenizer: Tokenizer, count: int) -> list[str]:
    """`count` different prompts: the first words of reviews, before any word of praise or blame.

    Raises:
        UsageError: there are not that many.
    """
    found: dict[str, None] = {}
    for _ in range(_OPENING_TRIES * count):
        if len(found) == count:
            break
        review = grammar.sample(rng)
        words = review[: grammar.meaning(review).start].split()
        fewest, most = PROMPT_WORDS
        if len(words) < fewest:
            continue
        prompt = " ".join(words[: rng.integers(fewest, min(len(words), most) + 1)])
        if len(tokenizer.encode(prompt)) <= MAX_PROMPT_LENGTH:
            found[prompt] = None
    if len(found) < count:
        raise UsageError(
            f"only {len(found)} different prompts were found, not {count}; lower num_train_prompts "
            "or num_heldout_prompts."
        )
    return list(found)


def write_prompts(prompts: list[str], path: Path) -> None:
    """One `{"prompt": ...}` per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
