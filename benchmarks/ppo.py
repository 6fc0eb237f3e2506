"""Time one PPO iteration, phase by phase, beside the machine's own limits.

    python benchmarks/ppo.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf

Every prompt has exactly P tokens and every response exactly T, all random, so that each iteration
is the same work on fresh inputs. The floor is the arithmetic that the iteration must do over the
speed of a large float32 matrix product measured in this process, plus the bytes that decoding must
read over the speed of a large copy. Compilation is reported apart, as the first iteration.
"""

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median

START = time.perf_counter()

import jax  # noqa: E402  (the clock starts before the imports)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from ppo_jax.agent import PPOAgent  # noqa: E402
from ppo_jax.config import OptimizerConfig, PPOConfig, TrainConfig  # noqa: E402
from ppo_jax.models import Qwen2Config, load_pretrained  # noqa: E402
from qwen_env.prompts import Prompt  # noqa: E402
from qwen_env.task import make_task  # noqa: E402
from qwen_env.tokenizer import load_tokenizer  # noqa: E402


@dataclass(frozen=True)
class Work:
    """What is timed."""

    model: str
    """A folder in Hugging Face layout, or a .gguf file."""
    batch_size: int = 8
    """B."""
    prompt_length: int = 24
    """P."""
    response_length: int = 32
    """T."""
    epochs: int = 4
    """Passes over the batch, one optimizer step each."""
    iterations: int = 5
    """Timed iterations, after the one that compiles."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main() -> None:
    work = tyro.cli(Work, description=__doc__)
    network = load_pretrained(work.model)
    config = network.config
    rng = np.random.default_rng(0)
    task = make_task(
        tokenizer=load_tokenizer(work.model),
        prompts=["unused"],
        reward=lambda batch: rng.normal(size=len(batch)).astype(np.float32),
        max_prompt_length=work.prompt_length,
        max_new_tokens=work.response_length,
        min_new_tokens=work.response_length,
        vocab_size=config.vocab_size,
    )
    settings = TrainConfig(
        ppo=PPOConfig(batch_size=work.batch_size, num_epochs=work.epochs),
        optimizer=OptimizerConfig(learning_rate=1e-6),
    )
    agent = PPOAgent(network, task, settings, num_iterations=work.iterations + 1)
    loaded = time.perf_counter()
    rows = []
    for i in range(work.iterations + 1):
        ids = rng.integers(100, 40_000, (work.batch_size, work.prompt_length)).astype(np.int32)
        prompts = [Prompt("", row, {}, 0) for row in ids]
        start = time.perf_counter()
        episodes = agent.actor.respond(agent.state.params, prompts, jax.random.key(i))
        metrics = agent.update(episodes)
        rows.append(
            {
                "rollout": episodes.rollout_s,
                "update": metrics["time/update_s"],
                "iteration": time.perf_counter() - start,
            }
        )
        assert metrics["rollout/length_mean"] == work.response_length
        assert metrics["update/epochs"] == work.epochs
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    flops, copied = matmul_speed(), copy_speed()
    phases = {name: median(row[name] for row in rows[1:]) for name in rows[0]}
    floors = floor_seconds(config, work, flops, copied)
    report = {
        "work": asdict(work),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax")},
        "seconds": phases,
        "floor_seconds": floors,
        "start_to_end_of_first_iteration_s": loaded - START + rows[0]["iteration"],
        "generated_tokens_per_s": work.batch_size * work.response_length / phases["rollout"],
        "peak_memory_gib": peak_memory,
        "matmul_gflops": flops / 1e9,
        "copy_gb_per_s": copied / 1e9,
    }
    if work.json:
        print(json.dumps(report))
        return
    table = Table("phase", "seconds", "floor", "times its floor")
    for name, seconds in phases.items():
        numbers = (seconds, floors[name], seconds / floors[name])
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console().print(table)
    for name in ("start_to_end_of_first_iteration_s", "generated_tokens_per_s"):
        print(f"{name}: {report[name]:.1f}")
    print(f"peak_memory_gib: {peak_memory:.2f}")
    print(f"matmul: {flops / 1e9:.0f} GFLOP/s; copy: {copied / 1e9:.1f} GB/s")


def floor_seconds(
    config: Qwen2Config, work: Work, flops: float, bandwidth: float
) -> dict[str, float]:
    """The least time each phase can take: multiply-adds of the matrix products, bytes of decode."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.head_dim
    attention = d * heads * (config.num_attention_heads * 2 + config.num_key_value_heads * 2)
    body = config.num_hidden_layers * (attention + 3 * d * f)
    head = config.vocab_size * d
    tokens = work.batch_size * (work.prompt_length + work.response_length)
    responses = work.batch_size * work.response_length
    forward = 2 * (body * tokens + head * responses)
    prefill = 2 * body * work.batch_size * work.prompt_length
    decode = 2 * (body + head) * responses
    weights = 4 * (body + head) * work.response_length
    rollout = (prefill + decode) / flops + weights / bandwidth
    # Old and reference log-probabilities, then forward and backward once an epoch.
    update = (2 + 3 * work.epochs) * forward / flops
    return {"rollout": rollout, "update": update, "iteration": rollout + update}


def matmul_speed(size: int = 2048) -> float:
    """Best FLOP/s of a large float32 matrix product."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    return 2 * size**3 / best_seconds(jax.jit(jnp.matmul), x, x)


def copy_speed(size: int = 2**27) -> float:
    """Best bytes read a second by a sum over a large array."""
    x = jnp.asarray(np.random.default_rng(0).random(size), jnp.float32)
    return x.nbytes / best_seconds(jax.jit(jnp.sum), x)


def best_seconds(function: Callable[..., jax.Array], *arguments: jax.Array, runs: int = 7) -> float:
    function(*arguments).block_until_ready()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
