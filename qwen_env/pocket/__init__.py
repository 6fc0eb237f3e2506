"""The embedded default task: a small Qwen2 policy, a reward model, prompts, and their grammar.

`python tools/make_pocket.py` makes the files again.
"""

from pathlib import Path

_HERE = Path(__file__).parent

POLICY_FOLDER = _HERE / "policy"
"""A Qwen2 language model of film reviews and its tokenizer, a Hugging Face folder."""

REWARD_FOLDER = _HERE / "reward"
"""A Qwen2 sequence-classification reward model (one score), a Hugging Face folder."""

TRAIN_PROMPTS = _HERE / "train_prompts.jsonl"
HELDOUT_PROMPTS = _HERE / "heldout_prompts.jsonl"
"""Openings of reviews, one `{"prompt": ...}` per line; the two files share none."""

MAX_PROMPT_LENGTH = 8
MAX_NEW_TOKENS = 28
"""Limits in tokens, which every prompt and every review that continues one respect."""
