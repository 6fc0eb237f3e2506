"""Time generation alone, of responses of many lengths, in batches and in slots that are refilled.

    python benchmarks/rollouts.py --model random:smollm2-135m --rows 64 --slots 16
    python benchmarks/rollouts.py --model random:qwen2.5-0.5b --rows 256 --slots 64 \
        --prompt-length 192 --response-length 512 --mean-response-length 278 --only-count

All ways write the same tokens, in turn, on an otherwise idle machine or not: what counts are the
ratios. Beside them stands what each way must move: the weights and the caches that a decode step
reads, and the weights that a prefill reads. A GPU or a TPU is bound by that; a CPU, which computes
more slowly, is bound by the rows of the steps.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ppo import SHAPES, Work, task_of
from rich.console import Console
from rich.table import Table

from ppo_jax import flags
from ppo_jax.compilation import jit
from ppo_jax.generation.rollout import Rollout, rollout
from ppo_jax.generation.slots import SHARES, group_size
from ppo_jax.models import DecoderConfig, PolicyValueNetwork
from qwen_env import mdp


@dataclass(frozen=True)
class Arguments:
    """What is timed."""

    model: str = "random:tiny"
    """One of the SHAPES of benchmarks/ppo.py."""
    layers: int | None = None
    """Give the model so many layers; with fewer, programs compile sooner."""
    rows: int = 64
    """Responses, each to a prompt of its own."""
    slots: int = 16
    """Responses written at a time, in batches or as slots are free."""
    prompt_length: int = 24
    """P; prompts have 1 to P tokens."""
    response_length: int = 64
    """T, the longest response."""
    mean_response_length: int = 32
    """Responses end by chance, so that their mean is about this."""
    dtype: str = "float32"
    """Compute type."""
    repeats: int = 3
    """Times that each way is timed, after one run that compiles."""
    only_count: bool = False
    """Draw the lengths by chance, run nothing, and say what each way must move."""
    json: bool = False
    """Print one JSON object instead of a table."""


class Way(NamedTuple):
    """How rows are written."""

    rows: int  # a batch
    num_slots: int | None = None
    compacts_rows: bool = False


def ways(work: Arguments) -> dict[str, Way]:
    rows, slots = work.rows, work.slots
    return {
        f"batches of {slots}": Way(slots),
        f"batches of {slots}, shrinking": Way(slots, compacts_rows=True),
        f"all {rows} at once": Way(rows),
        f"all {rows} at once, shrinking": Way(rows, compacts_rows=True),
        f"{slots} slots, refilled": Way(rows, slots),
        f"{slots} slots, refilled, then shrinking": Way(rows, slots, compacts_rows=True),
    }


def main() -> None:
    work = flags.parse(Arguments(), sys.argv[1:], prog="python benchmarks/rollouts.py")
    report = measure(work)
    print(json.dumps(report)) if work.json else show(report)


def shape_of(work: Arguments) -> DecoderConfig:
    shape = SHAPES[work.model]
    return shape if work.layers is None else replace(shape, num_hidden_layers=work.layers)


def measure(work: Arguments) -> dict[str, Any]:
    """For each way: seconds, CPU seconds, and what it moves, of the same tokens."""
    network = jax.jit(
        lambda: PolicyValueNetwork(shape_of(work), rngs=nnx.Rngs(0), dtype=work.dtype)
    )
    results: dict[str, dict[str, Any]] = {name: {} for name in ways(work)}
    lengths = lengths_by_chance(work) if work.only_count else timed(work, network(), results)
    for name, way in ways(work).items():
        results[name] |= moved(work, way, lengths)
    return {"lengths": lengths.tolist(), "ways": results}


def timed(
    work: Arguments, network: PolicyValueNetwork, results: dict[str, dict[str, Any]]
) -> np.ndarray:
    rng = np.random.default_rng(0)
    vocab_size = network.config.vocab_size
    ids = rng.integers(1, vocab_size // 2, (work.rows, work.prompt_length)).astype(np.int32)
    prompt_length = rng.integers(1, work.prompt_length + 1, work.rows).astype(np.int32)
    graphdef, params = nnx.split(network)
    rules = task_of(
        Work(
            work.model,
            prompt_length=work.prompt_length,
            response_length=work.response_length,
            mean_response_length=work.mean_response_length,
        ),
        vocab_size,
    ).rules

    def program(way: Way) -> Callable[[int], mdp.State]:
        @jit
        def compiled(params: nnx.State, ids: Any, length: Any, number: Any, key: Any) -> Rollout:
            return rollout(
                nnx.merge(graphdef, params),
                ids,
                length,
                key,
                rules=rules,
                prompt_number=number,
                compacts_rows=way.compacts_rows,
                num_slots=way.num_slots,
            )

        def run(seed: int) -> mdp.State:
            parts = [slice(i, i + way.rows) for i in range(0, work.rows, way.rows)]
            states = [
                compiled(
                    params, ids[part], prompt_length[part], np.arange(work.rows)[part], key
                ).state
                for key in [jax.random.key(seed)]
                for part in parts
            ]
            return jax.device_get(jax.tree.map(lambda *x: jnp.concatenate(x), *states))

        return run

    programs = {name: program(way) for name, way in ways(work).items()}
    for name, run in programs.items():
        start = time.perf_counter()
        run(0)
        results[name] |= {"first_s": time.perf_counter() - start, "s": [], "cpu_s": []}
    for seed in range(1, work.repeats + 1):
        first = None
        for name, run in programs.items():
            start, cpu = time.perf_counter(), time.process_time()
            state = run(seed)
            results[name]["s"].append(time.perf_counter() - start)
            results[name]["cpu_s"].append(time.process_time() - cpu)
            first = state if first is None else first
            assert (state.length == first.length).all()
    return mdp.response_length(first)


def lengths_by_chance(work: Arguments) -> np.ndarray:
    """Geometric, cut off at T; the mean of (1 - (1-p)^T) / p is the one asked for."""
    hazards = np.geomspace(1e-6, 1, 100_000)
    means = (1 - (1 - hazards) ** work.response_length) / hazards
    hazard = hazards[np.argmin(abs(means - work.mean_response_length))]
    drawn = np.random.default_rng(0).geometric(hazard, work.rows)
    return np.minimum(drawn, work.response_length)


def moved(work: Arguments, way: Way, lengths: np.ndarray) -> dict[str, float]:
    """Decode steps, rows of all steps, and GB that they and the prompts' weights come to."""
    shape, size = shape_of(work), jnp.dtype(work.dtype).itemsize
    network = nnx.eval_shape(lambda: PolicyValueNetwork(shape, rngs=nnx.Rngs(0)))
    weights = size * sum(x.size for x in jax.tree.leaves(nnx.state(network.backbone)))
    a_row = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size
    a_row *= work.prompt_length + work.response_length
    steps, prefills = [], 0
    for start in range(0, work.rows, way.rows):
        some, groups = steps_of(work, way, lengths[start : start + way.rows])
        steps += some
        prefills += groups
    total = weights * (len(steps) + prefills) + a_row * sum(steps)
    return {
        "steps": len(steps),
        "rows_of_steps": sum(steps),
        "prefills": prefills,
        "gb": total / 1e9,
    }


def steps_of(work: Arguments, way: Way, lengths: np.ndarray) -> tuple[list[int], int]:
    """The rows of each decode step of a batch, and in how many groups its prompts are read."""
    num_slots = way.num_slots or way.rows
    size = way.rows
    if num_slots < way.rows:
        size = group_size(num_slots, way.rows, way.rows, work.response_length)
    stages = [num_slots, *(int(share * num_slots) for share in SHARES if way.compacts_rows)]
    left, waiting, steps = np.zeros(num_slots, int), list(lengths), []
    while waiting or (left > 0).any():
        while waiting and (left <= 0).sum() >= size:
            left[np.flatnonzero(left <= 0)[:size]] = np.array(waiting[:size]) - 1
            del waiting[:size]
        running = (left > 0).sum()
        if running:
            steps.append(num_slots if waiting else min(n for n in stages if n >= running))
        left -= 1
    return steps, way.rows // size


def show(report: dict[str, Any]) -> None:
    lengths, results = report["lengths"], report["ways"]
    first = next(iter(results.values()))

    def ratio(result: dict[str, Any], name: str) -> str:
        """How many times as fast as the first way: the median of pairs."""
        if name not in result:
            return ""
        return f"{median(a / b for a, b in zip(first[name], result[name], strict=True)):.2f} x"

    counted = "steps", "rows of steps", "prefills", "GB", "by GB"
    table = Table(
        "way",
        *(*counted, "CPU s", "s", "by CPU s", "by s", "first call, s"),
        title=f"{len(lengths)} responses of {min(lengths)} to {max(lengths)} tokens, "
        f"{np.mean(lengths):.0f} on average",
    )
    for name, result in results.items():
        seconds = [f"{median(result[x]):.2f}" if x in result else "" for x in ("cpu_s", "s")]
        table.add_row(
            name,
            *(f"{result[x]:,}" for x in ("steps", "rows_of_steps", "prefills")),
            f"{result['gb']:,.1f}",
            f"{first['gb'] / result['gb']:.2f} x",
            *seconds,
            ratio(result, "cpu_s"),
            ratio(result, "s"),
            f"{result['first_s']:.1f}" if "first_s" in result else "",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
