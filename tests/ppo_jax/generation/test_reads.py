"""A rollout that reads only a part of the caches until more of them is in use."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax.generation.slots as slots_module
from ppo_jax.generation.rollout import rollout
from ppo_jax.sampling import Sampling
from qwen_env import mdp

P, T = 8, 24
RAGGED = {"max_prompt_length": P, "max_new_tokens": T, "eos_token_ids": (0, *range(300, 360))}
MANY = {"completions_per_prompt": 60}
"""So that keys and values are many beside the tiny network's weights."""


def compile_rollout(network, task, **options):
    """A function from a seed to a rollout; without LLVM's optimizer, as runs are few."""
    first = task.initial_state(task.prompts)
    ids, lengths = jnp.asarray(first.tokens[:, :P]), jnp.asarray(first.prompt_length)

    def roll(key):
        return rollout(network, ids, lengths, key, rules=task.rules, **options)

    compiled = jax.jit(roll, compiler_options={"xla_backend_optimization_level": 0})
    return lambda seed=0: jax.device_get(compiled(jax.random.key(seed)))


@pytest.fixture
def reads(monkeypatch):
    """(rows, slots that are read) of each decode step, once all effects are there."""
    found, decode = [], slots_module.decode

    def watched(network, layers, state, cache, step, rules, num_read):
        rows = len(state.length)
        jax.debug.callback(lambda: found.append((rows, num_read)))
        return decode(network, layers, state, cache, step, rules, num_read)

    monkeypatch.setattr(slots_module, "decode", watched)
    return found


@pytest.mark.parametrize("shrinks", [False, True])
def test_what_is_not_read_changes_no_token(make_network, make_test_task, reads, shrinks):
    network, task = make_network(), make_test_task(**RAGGED)
    options = MANY | {"sampling": Sampling(top_k=200), "compacts_rows": shrinks}
    whole = compile_rollout(network, task, **options)
    bounded = compile_rollout(network, task, **options, bounds_reads=True)
    for seed in range(2):
        expected = whole(seed)
        jax.effects_barrier()
        assert {slots for _, slots in reads} == {P + T}
        reads.clear()
        result = bounded(seed)
        jax.effects_barrier()
        chex.assert_trees_all_equal(
            (result.state, result.sampling_mask), (expected.state, expected.sampling_mask)
        )
        np.testing.assert_allclose(result.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        steps = int(mdp.response_length(expected.state).max()) - 1  # the first is the prefill's
        limits = [P + 6, P + 12, P + 18, P + 24]
        least = [min(n for n in limits if n > P + i) for i in range(steps)]
        assert sorted(slots for _, slots in reads) == least
        assert len({rows for rows, _ in reads}) > 1 or not shrinks
        reads.clear()


def test_all_slots_are_read_where_weights_are_most_of_it(make_network, make_test_task, reads):
    task = make_test_task(**RAGGED)
    compile_rollout(make_network(), task, bounds_reads=True)()
    jax.effects_barrier()
    assert set(reads) == {(5, P + T)}


def test_where_rows_take_each_others_slots_all_are_read(make_network, make_test_task, reads):
    options = MANY | {"num_slots": 100, "bounds_reads": True}
    compile_rollout(make_network(), make_test_task(**RAGGED), **options)()
    jax.effects_barrier()
    assert set(reads) == {(100, P + T)}
