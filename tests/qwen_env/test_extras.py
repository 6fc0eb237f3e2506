"""What is optional is asked for by name, with the line that installs it."""

import sys

import pytest
from gymnasium.error import DependencyNotInstalled

from qwen_env.rewards import load_reward, score
from qwen_env.rewards.base import RewardBatch
from qwen_env.rewards.sentiment import _vader, vader_compound
from qwen_env.tasks import load_named_task
from qwen_env.tokenizer.gguf import load_gguf_tokenizer

EMPTY = RewardBatch([], [], [], [], [], [])


def use_vader():
    _vader.cache_clear()
    score(vader_compound, EMPTY)


@pytest.mark.parametrize(
    ("module", "package", "use"),
    [
        ("gguf", "gguf", lambda: load_gguf_tokenizer("model.gguf")),
        ("torch", "torch", lambda: load_reward("hf:folder")),
        ("transformers", "torch", lambda: load_reward("hf:folder")),
        ("vaderSentiment.vaderSentiment", "vaderSentiment", use_vader),
        ("reasoning_gym", "reasoning-gym", lambda: load_named_task("reasoning_gym:chain_sum")),
        ("textarena", "textarena", lambda: load_named_task("textarena:GuessTheNumber-v0")),
        ("datasets", "datasets", lambda: load_named_task("gsm8k")),
    ],
)
def test_a_missing_package(monkeypatch, module, package, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyNotInstalled) as caught:
        use()
    assert str(caught.value) == f"{module} is not installed; run: pip install {package}"
