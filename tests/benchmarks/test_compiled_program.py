"""What is read from a compiled program's text, and that programs do not get worse."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compile_ahead import Iteration, mesh_of, v5e_topology
from compiled_program import CompiledProgram, Cost
from ppo import Work

from ppo_jax.compilation import float32_products
from ppo_jax.mesh import replicated
from ppo_jax.models.attention import KeyValue, attend, sequences
from ppo_jax.models.decoder import project
from ppo_jax.sampling import greatest

WRITTEN = """
HloModule test

%sliced (param_0: f32[100,10], param_1: s32[]) -> f32[1,10] {
  %param_0 = f32[100,10]{1,0} parameter(0)
  %view = f32[100,10]{1,0} bitcast(%param_0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,10]{1,0} dynamic-slice(%view, %param_1, %zero), dynamic_slice_sizes={1,10}
}

%written (param_0.1: f32[100,10], param_1.1: f32[1,10], param_2.1: s32[]) -> f32[100,10] {
  %param_0.1 = f32[100,10]{1,0} parameter(0)
  %param_1.1 = f32[1,10]{1,0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %all = f32[100,10]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1, %zero.1)
}

%body (state: (s32[], f32[100,10])) -> (s32[], f32[100,10]) {
  %state = (s32[], f32[100,10]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[100,10]{1,0} get-tuple-element(%state), index=1
  %fast = f32[100,10]{1,0:T(8,128)S(1)} copy(%x)
  %one = f32[1,10]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  %sum = f32[1,10]{1,0} all-reduce(%one), to_apply=%add
  %y = f32[100,10]{1,0} fusion(%x, %sum, %i), kind=kLoop, calls=%written
  ROOT %next = (s32[], f32[100,10]{1,0}) tuple(%i, %y)
}

%condition (state.1: (s32[], f32[100,10])) -> pred[] {
  %state.1 = (s32[], f32[100,10]{1,0}) parameter(0)
  ROOT %goes_on = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[100,10])) -> (s32[], f32[100,10]) {
  %start = (s32[], f32[100,10]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[100,10]{1,0}) while(%start), condition=%condition, body=%body TRIPS
}
"""


def test_bytes_kernels_and_collectives_of_a_program() -> None:
    trips = ', backend_config={"known_trip_count":{"n":"5"}}'
    program = CompiledProgram(WRITTEN.replace(" TRIPS", trips))
    # A copy to fast memory reads all; a slice is read with its number, and written; it is summed;
    # the sum and the number are read, and the sum is written in place.
    once = Cost(4000 + (40 + 4 + 40) + (40 + 40) + (40 + 4 + 40), 4, {"all-reduce": 1}, 40)
    assert program.cost("%body") == once
    assert program.cost() == once * 5
    assert program.loops() == []
    unknown = CompiledProgram(WRITTEN.replace(" TRIPS", ""))
    assert unknown.loops() == ["%body"]
    assert unknown.cost() == once
    # A TPU's text leaves it to the condition.
    counted = WRITTEN.replace(" TRIPS", "").replace(
        "ROOT %goes_on = pred[] constant(true)",
        """%counter = s32[] get-tuple-element(%state.1), index=0
  %count = s32[] constant(5)
  ROOT %goes_on = pred[] compare(%counter, %count), direction=LT""",
    )
    assert CompiledProgram(counted).loops() == []
    assert CompiledProgram(counted).cost() == once * 5
    # What is sliced, and its sum, are made and read in a turn; the array that is written is not.
    cached = CompiledProgram(WRITTEN.replace(" TRIPS", trips), cached=100)
    assert cached.cost("%body").bytes == 4000 + (40 + 4) + 0 + (4 + 40)
    assert CompiledProgram(WRITTEN.replace(" TRIPS", trips), cached=39).cost("%body") == once


def test_a_collective_that_is_fused_with_what_is_computed_counts_once() -> None:
    """A TPU's, whose parts are in several fusions and have one channel."""
    text = """
%begin (x: bf16[1,8]) -> bf16[8,8] {
  %x = bf16[1,8]{1,0} parameter(0)
  ROOT %whole = bf16[8,8]{1,0} all-gather(%x), channel_id=7, dimensions={0}
}

%finish (y: bf16[1,8]) -> bf16[8,8] {
  %y = bf16[1,8]{1,0} parameter(0)
  ROOT %all = bf16[8,8]{1,0} all-gather(%y), channel_id=7, dimensions={0}
}

ENTRY %main (shard: bf16[1,8]) -> bf16[8,8] {
  %shard = bf16[1,8]{1,0} parameter(0)
  %some = bf16[8,8]{1,0} fusion(%shard), kind=kOutput, calls=%begin
  ROOT %rest = bf16[8,8]{1,0} fusion(%shard), kind=kOutput, calls=%finish
}
"""
    cost = CompiledProgram(text).cost()
    assert (cost.collectives, cost.linked) == ({"all-gather": 1}, 2 * 64)


def test_a_sum_over_devices_that_goes_on_while_others_compute() -> None:
    """A GPU's, whose type is the result's alone."""
    text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %begun = f32[8]{0} all-reduce-start(%x), channel_id=1, to_apply=%add
  ROOT %sum = f32[8]{0} all-reduce-done(%begun)
}
"""
    assert CompiledProgram(text).cost() == Cost(2 * 32, 1, {"all-reduce": 1}, 32)


def test_bytes_of_what_xla_compiles() -> None:
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sin(x @ y).sum(1)

    x = jnp.zeros((256, 512))
    program = CompiledProgram(jax.jit(product).lower(x, x.T).compile().as_text())
    read, logits, sums = 2 * 4 * x.size, 4 * 256 * 256, 4 * 256
    assert read + sums <= program.cost().bytes <= read + 6 * logits + 2 * sums
    assert program.cost().collectives == {}


@pytest.mark.slow
def test_what_an_iteration_moves_and_holds_is_no_more_than_it_was() -> None:
    """On a CPU, of a tiny network: lower the figures as programs get better."""
    iteration = Iteration(Work("random:tiny", batch_size=16, prompt_length=32, response_length=96))
    compiled = dict(iteration.programs())
    rollout = CompiledProgram(compiled["rollout"].as_text())
    [decode] = [rollout.cost(body) for body in rollout.loops()]
    assert decode.bytes < 8.1 * iteration.least_moved()  # most of it logits and keys
    held = compiled["update"].memory_analysis().temp_size_in_bytes
    assert held < 4.6 * iteration.least_kept()  # most of it logits


of_tpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu compiles for the TPU")


@of_tpu
@pytest.mark.parametrize("size", [256, 704])
def test_logits_of_attention_never_reach_the_memory_of_a_tpu(size: int) -> None:
    """Forward and backward, where products of float32 are exact; the formula's move ten times this.

    The least is queries, keys, values, their gradients, the result and its gradient.
    """
    device = replicated(mesh_of(v5e_topology(1), 1, 1))
    query = jax.ShapeDtypeStruct((4, 14, size, 64), jnp.bfloat16, sharding=device)
    key = jax.ShapeDtypeStruct((4, 2, size, 64), jnp.bfloat16, sharding=device)
    number = jax.ShapeDtypeStruct((4, size), jnp.int32, sharding=device)

    def both(query: Any, key: Any, value: Any, number: Any, cotangent: Any) -> Any:
        def mixed(query: Any, key: Any, value: Any) -> Any:
            return attend(query, KeyValue(key, value), sequences(number, size))

        with float32_products():
            result, pull_back = jax.vjp(mixed, query, key, value)
            return result, pull_back(cotangent)

    arguments = query, key, key, number, query
    program = CompiledProgram(jax.jit(both).lower(*arguments).compile().as_text())
    assert program.cost().bytes < 2.5 * 2 * 4 * (query.size + key.size)


@of_tpu
def test_logits_of_a_decode_step_never_reach_the_memory_of_a_tpu() -> None:
    """Of Qwen's vocabulary: the projection is read, and that is all."""
    device = replicated(mesh_of(v5e_topology(1), 1, 1))
    vocab_size, hidden_size, rows = 151_936, 896, 256

    def placed(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def draw(hidden: jax.Array, projection: jax.Array, keys: jax.Array) -> Any:
        noise = jax.vmap(partial(jax.random.gumbel, shape=(vocab_size,)))(keys)
        return greatest(project(hidden, projection), noise)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    arguments = (
        placed((rows, hidden_size), jnp.bfloat16),
        placed((vocab_size, hidden_size), jnp.bfloat16),
        placed(keys.shape, keys.dtype),
    )
    program = CompiledProgram(jax.jit(draw).lower(*arguments).compile().as_text())
    assert program.cost().bytes < 1.01 * 2 * vocab_size * hidden_size


@of_tpu
def test_a_tpu_reads_no_slot_of_a_cache_that_is_not_in_use() -> None:
    """A decode step of 256 rows, which reads 320 of 704 slots: no copy is made of them either."""
    device = replicated(mesh_of(v5e_topology(1), 1, 1))
    rows, in_use = 256, 320
    cache = jax.ShapeDtypeStruct((rows, 2, 704, 64), jnp.bfloat16, sharding=device)
    query = jax.ShapeDtypeStruct((rows, 14, 1, 64), jnp.bfloat16, sharding=device)
    seen = jax.ShapeDtypeStruct((rows, 1, in_use), jnp.bool_, sharding=device)

    def step(query: Any, key: Any, value: Any, seen: Any) -> Any:
        return attend(query, KeyValue(key, value), seen)

    program = CompiledProgram(jax.jit(step).lower(query, cache, cache, seen).compile().as_text())
    assert program.cost().bytes < 1.1 * (2 * 2 * rows * 2 * in_use * 64 + seen.size)
