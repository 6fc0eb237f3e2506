import numpy as np
import pytest

from qwen_env.pocket import grammar
from qwen_env.rewards import score
from qwen_env.rewards.sentiment import pocket_grammatical, pocket_sentiment, vader_compound


def test_the_pocket_reward_reads_the_whole_review(make_batch):
    review = grammar.sample(np.random.default_rng(0))
    cut = len(review) // 2
    values = score(pocket_sentiment, make_batch([review[cut:], " xx"], prompt=review[:cut])).values
    assert values[0] == np.float32(grammar.sentiment(review))
    assert values[1] == np.float32(grammar.OFF_GRAMMAR)


def test_grammatical_is_one_for_whole_reviews_alone(make_batch):
    review = grammar.sample(np.random.default_rng(0))
    cut = len(review) // 2
    batch = make_batch([review[cut:], review[cut:-3], " xx"], prompt=review[:cut])
    assert score(pocket_grammatical, batch).values.tolist() == [1, 0, 0]


def test_vader_reads_the_whole_review(make_batch):
    values = score(vader_compound, make_batch([" is great", " is not great", ""])).values
    assert values == pytest.approx([0.6249, -0.5096, 0.0], abs=1e-4)
    values = score(vader_compound, make_batch([" film"], prompt="A wonderful")).values
    assert values[0] > 0.5
