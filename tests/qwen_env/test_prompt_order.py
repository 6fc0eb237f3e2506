import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen_env.prompt_order import PromptSampler, prompt_indices


def draw(prompt_order, count, times, seed=0):
    sampler, rng = PromptSampler(count, prompt_order), np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(times)]


def test_sequential_goes_round():
    assert draw("sequential", 3, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_shuffle_takes_each_once_a_round_in_new_orders():
    order = np.array(draw("shuffle", 10, 50)).reshape(5, 10)
    assert (np.sort(order) == np.arange(10)).all()
    assert len({tuple(row) for row in order}) == 5


def test_uniform_is_uniform():
    counts = np.bincount(draw("uniform", 4, 4000), minlength=4)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 16.27, "the 0.999 quantile with 3 degrees of freedom"


def test_the_order_is_the_seed_s_also_after_a_restart():
    for prompt_order in ("uniform", "shuffle", "sequential"):
        sampler = PromptSampler(10, prompt_order)
        sampler.sample(np.random.default_rng(5))
        sampler.restart()
        rng = np.random.default_rng(0)
        assert [sampler.sample(rng) for _ in range(15)] == draw(prompt_order, 10, 15)
    assert draw("shuffle", 10, 15) != draw("shuffle", 10, 15, seed=1)


@given(
    seed=st.integers(0, 5),
    batch_size=st.integers(1, 12),
    count=st.integers(1, 20),
    iterations=st.integers(1, 8),
)
def test_prompts_come_in_shuffled_passes(seed, batch_size, count, iterations):
    stream = [
        index for i in range(iterations) for index in prompt_indices(seed, i, batch_size, count)
    ]
    for start in range(0, len(stream), count):
        one_pass = stream[start : start + count]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(range(count))


def test_passes_differ_with_their_number_and_the_seed_and_not_with_the_batch_size():
    def orders(seed: int, batch_size: int) -> list[tuple[int, ...]]:
        stream = [
            index
            for i in range(60 // batch_size)
            for index in prompt_indices(seed, i, batch_size, 10)
        ]
        return [tuple(stream[start : start + 10]) for start in range(0, 60, 10)]

    whole = orders(3, 10)
    assert len(set(whole)) == 6
    assert orders(3, 4) == orders(3, 15) == whole
    assert not set(whole) & set(orders(4, 10))
