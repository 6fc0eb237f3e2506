"""A rollout in fewer slots than rows, against the one that writes all rows at once."""

import re

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings

import ppo_jax.generation.slots as slots_module
from ppo_jax.generation.actor import Actor
from ppo_jax.generation.rollout import rollout
from ppo_jax.generation.slots import SHARES, group_size
from ppo_jax.mesh import make_mesh
from ppo_jax.sampling import Sampling
from qwen_env import mdp
from qwen_env.errors import UsageError

T = 12
RAGGED = {"max_new_tokens": T, "eos_token_ids": (0, *range(300, 400))}


def compile_rollout(network, task, prompts, **options):
    """A function from a seed to a rollout; without LLVM's optimizer, as runs are few."""
    first = task.initial_state(prompts)
    graphdef, params = nnx.split(network)

    def roll(params, key):
        ids = jnp.asarray(first.tokens[:, : task.rules.max_prompt_length])
        lengths = jnp.asarray(first.prompt_length)
        network = nnx.merge(graphdef, params)
        return rollout(network, ids, lengths, key, rules=task.rules, **options)

    compiled = jax.jit(roll, compiler_options={"xla_backend_optimization_level": 0})
    return lambda seed: jax.device_get(compiled(params, jax.random.key(seed)))


def assert_same(one, other):
    """And the log-probabilities but for rounding: products of other sizes are summed otherwise."""
    chex.assert_trees_all_equal((one.state, one.sampling_mask), (other.state, other.sampling_mask))
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def network(make_network):
    return make_network(num_hidden_layers=1)


WAYS_OF_WRITING = st.fixed_dictionaries(
    {
        "sampling": st.sampled_from([Sampling(), Sampling(0.7, top_k=90), Sampling(top_p=0.8)]),
        "greedy": st.booleans(),
    }
)
RULES = st.fixed_dictionaries(
    {
        "min_new_tokens": st.sampled_from([0, 3]),
        "stop": st.sampled_from([(), ("e", "th")]),
        "eos_token_ids": st.sampled_from([(0,), (0, *range(300, 400)), tuple(range(250, 600))]),
    }
)


def assert_slots_change_nothing(network, make_test_task, data):
    task = make_test_task(**RAGGED | data.draw(RULES))
    completions = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 12))
    num_slots = data.draw(st.integers(1, count * completions))
    prompts = [task.prompts[i % 5] for i in range(count)]
    options = data.draw(WAYS_OF_WRITING) | {"completions_per_prompt": completions}
    whole = compile_rollout(network, task, prompts, **options)
    shrinks = data.draw(st.booleans())
    some = compile_rollout(
        network, task, prompts, **options, num_slots=num_slots, compacts_rows=shrinks
    )
    for seed in range(3):
        assert_same(whole(seed), some(seed))


@settings(max_examples=3, deadline=None, phases=[Phase.generate], derandomize=True)
@given(data=st.data())
def test_slots_change_no_token(network, make_test_task, data):
    assert_slots_change_nothing(network, make_test_task, data)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_slots_change_no_token_whatever_is_written(network, make_test_task, data):
    assert_slots_change_nothing(network, make_test_task, data)


def steps_of(lengths, num_slots, size, stages):
    """The rows of each decode step, counted in Python. The first token comes from the prefill."""
    waiting, left, steps = list(lengths), [0] * num_slots, []
    while waiting or any(left):
        while waiting and left.count(0) >= size:
            for slot in [i for i, n in enumerate(left) if n == 0][:size]:
                left[slot] = waiting.pop(0) - 1
        running = num_slots - left.count(0)
        if running:
            steps.append(num_slots if waiting else min(n for n in stages if n >= running))
        left = [max(n - 1, 0) for n in left]
    return steps


@pytest.mark.parametrize("shrinks", [False, True])
def test_no_slot_is_free_for_longer_than_it_must(network, make_test_task, monkeypatch, shrinks):
    """Every decode step has N rows while prompts wait, and there are as many steps as there must
    be."""
    rows_decoded, decode = [], slots_module.decode

    def counted(network, layers, state, *others):
        rows = len(state.length)
        jax.debug.callback(lambda: rows_decoded.append(rows))
        return decode(network, layers, state, *others)

    monkeypatch.setattr(slots_module, "decode", counted)
    task = make_test_task(**RAGGED)
    prompts = [task.prompts[i % 5] for i in range(24)]
    size = group_size(8, 24, 24, T)
    assert size == 4
    sample = compile_rollout(network, task, prompts, num_slots=8, compacts_rows=shrinks)
    lengths = mdp.response_length(sample(0).state)
    jax.effects_barrier()
    stages = [8, *(int(share * 8) for share in SHARES if shrinks)]
    assert rows_decoded == steps_of(lengths, 8, size, stages)
    in_batches = sum(max(lengths[i : i + 8]) - 1 for i in (0, 8, 16))
    assert len(rows_decoded) < in_batches, "or it is not ragged"
    assert (len(set(rows_decoded)) > 2) == shrinks


def test_a_prompt_is_read_once_for_the_rows_that_begin_together(
    network, make_test_task, monkeypatch
):
    read, prefill = [], slots_module.prefill_in_loop

    def watched(network, layers, prompts, rules):
        rows = len(prompts.length)
        jax.debug.callback(lambda: read.append(rows))
        return prefill(network, layers, prompts, rules)

    monkeypatch.setattr(slots_module, "prefill_in_loop", watched)
    task = make_test_task(**RAGGED)
    for completions, num_slots, expected in ((2, 8, [2, 2, 2]), (6, 6, [1] * 4)):
        prompts = (list(task.prompts) * 2)[: 12 // completions]
        options = {"completions_per_prompt": completions, "num_slots": num_slots}
        compile_rollout(network, task, prompts, **options)(0)
        jax.effects_barrier()
        assert read == expected
        read.clear()


@given(
    completions=st.integers(1, 12),
    num_prompts=st.integers(1, 40),
    num_slots=st.integers(1, 100),
    max_new_tokens=st.integers(1, 2000),
)
def test_groups_are_of_one_size_and_fit(completions, num_prompts, num_slots, max_new_tokens):
    num_rows = completions * num_prompts
    size = group_size(num_slots, num_rows, num_prompts, max_new_tokens)
    assert 1 <= size <= max(num_slots, 1) or max_new_tokens < 4
    assert 1 <= size <= num_slots and num_rows % size == 0
    assert size % completions == 0 or completions % size == 0


def test_caches_have_no_more_rows_than_slots(network, make_test_task):
    """Read from the compiled program: S = 8 + T slots a row, 2 KV heads of size 8."""
    task = make_test_task(**RAGGED)
    first = task.initial_state([task.prompts[0]] * 30)

    def cached_rows(**options):
        actor = Actor(network, task, Sampling(), **options)
        program = actor._begin.lower(
            nnx.state(network),
            jnp.asarray(first.tokens[:, :8]),
            jnp.asarray(first.prompt_length),
            jnp.int32(0),
            jax.random.key(0),
            completions_per_prompt=1,
            greedy=False,
        ).compile()
        shapes = re.findall(rf"f32\[(\d+),2,{8 + T},8\]", program.as_text())
        return {int(rows) for rows in shapes}

    assert cached_rows() == {30}
    assert cached_rows(num_slots=7) == {7}
    assert cached_rows(num_slots=7, mesh=make_mesh(2)) == {7}


def test_nothing_is_compiled_the_second_time(network, make_test_task, compilations):
    task = make_test_task(**RAGGED)
    actor = Actor(network, task, Sampling(), num_slots=4)
    params = nnx.state(network)
    actor.respond(params, list(task.prompts) * 2, jax.random.key(0))
    compilations.clear()
    done = actor.respond(params, (list(task.prompts) * 2)[::-1], jax.random.key(1))
    assert not compilations
    assert {"eos", "length"} == {episode.finish_reason for episode in done.episodes}


def test_rows_that_wait_for_replies_are_refused(network, make_test_task):
    task = make_test_task(interaction=lambda batch: ["so"] * len(batch), max_turns=2)
    with pytest.raises(UsageError, match="rollout_slots is 4, but with max_turns 2 rows"):
        Actor(network, task, Sampling(), num_slots=4)
