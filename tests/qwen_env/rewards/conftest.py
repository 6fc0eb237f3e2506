import numpy as np
import pytest

from qwen_env.rewards import RewardBatch


@pytest.fixture
def make_batch():
    """Makes a batch from completions, with a prompt and a row for all."""

    def make_batch(completions, prompt="The film", **row):
        count = len(completions)
        return RewardBatch(
            prompts=[prompt] * count,
            completions=completions,
            prompt_ids=[np.arange(2)] * count,
            completion_ids=[np.arange(len(completion)) for completion in completions],
            rows=[{"prompt": prompt, **row}] * count,
            finish_reasons=["eos"] * count,
        )

    return make_batch


@pytest.fixture
def turns():
    """A batch of one conversation of two turns."""
    said = [("user", "Guess"), ("assistant", "4"), ("tool", "higher"), ("assistant", "6")]
    return RewardBatch(
        prompts=["<Guess>"],
        completions=["4\n6"],
        prompt_ids=[np.arange(2)],
        completion_ids=[np.arange(4)],
        rows=[{"prompt": "Guess"}],
        finish_reasons=["done"],
        messages=[[{"role": role, "content": content} for role, content in said]],
        response_ids=[np.arange(6)],
    )
