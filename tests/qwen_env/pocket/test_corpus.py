import numpy as np
import pytest

from qwen_env import pocket
from qwen_env.errors import UsageError
from qwen_env.pocket import corpus
from qwen_env.tokenizer import load_tokenizer


def test_more_openings_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(pocket.POLICY_FOLDER)
    assert len(set(corpus.openings(np.random.default_rng(0), tokenizer, 30))) == 30
    monkeypatch.setattr(corpus, "_OPENING_TRIES", 1)
    with pytest.raises(UsageError, match=r"only \d+ different .*, not 100; lower num_train_pro"):
        corpus.openings(np.random.default_rng(0), tokenizer, 100)
