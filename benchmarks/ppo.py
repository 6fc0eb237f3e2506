"""Time PPO iterations, phase by phase, beside the machine's own limits.

    python benchmarks/ppo.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/ppo.py --model random:qwen2.5-0.5b --batch-size 4 --prompt-length 64 \
        --response-length 64

Prompts are random tokens, and responses end by chance or not at all, so each iteration is the same
work on fresh inputs. The floor is the arithmetic that the iteration must do for its real tokens,
over the speed of a large matrix product measured in this process, plus the bytes that decoding must
read over the speed at which a large array is read. Compilation is reported apart.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import Any, Literal

START = time.perf_counter()

import jax  # noqa: E402  (the clock starts before the imports)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
from flax import nnx  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from ppo_jax import flags  # noqa: E402
from ppo_jax.agent import PPOAgent  # noqa: E402
from ppo_jax.config import OptimizerConfig, PPOConfig, RunConfig, TrainConfig  # noqa: E402
from ppo_jax.generation.actor import Experience  # noqa: E402
from ppo_jax.models import DecoderConfig, PolicyValueNetwork, load_pretrained  # noqa: E402
from qwen_env.prompts import Prompt  # noqa: E402
from qwen_env.task import TextTask, make_task  # noqa: E402
from qwen_env.tokenizer import Tokenizer  # noqa: E402

SHAPES = {
    "random:qwen2.5-0.5b": DecoderConfig.qwen2_5_0_5b(),
    "random:qwen2.5-1.5b": DecoderConfig(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
    ),
    "random:qwen2.5-3b": DecoderConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
    ),
    "random:qwen3-8b": DecoderConfig(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "random:smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    ),
    "random:tiny": DecoderConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    ),
}
"""Models of random weights: for the time it takes, their values do not matter."""


@dataclass(frozen=True)
class Work:
    """What is timed."""

    model: str = "random:tiny"
    """A folder in Hugging Face layout, a .gguf file, or one of SHAPES, such as random:tiny."""
    batch_size: int = 8
    """B."""
    prompt_length: int = 24
    """P; the prompts' length, or with mean_response_length the longest of uniform lengths."""
    response_length: int = 32
    """T, the longest response."""
    mean_response_length: int | None = None
    """Let responses of a model of random weights end by chance, so that their mean is about this;
    None runs all to the limit."""
    epochs: int = 4
    """Passes over the batch."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    microbatches: int = 1
    """Parts a minibatch is computed in."""
    packed_sizes: int = 1
    """See num_packed_sizes of the training script."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the parameters are kept in."""
    remat: bool = False
    """Recompute activations in the backward pass."""
    freeze_embeddings: bool = False
    """Do not train the embeddings, nor an output projection that is tied to them."""
    num_frozen_layers: int = 0
    """Do not train so many of the lowest layers."""
    lora_rank: int | None = None
    """Train adapters of this rank; None trains the model itself."""
    critic: Literal["shared", "separate"] = "shared"
    """The value function's backbone: the policy's, or one of its own."""
    iterations: int = 5
    """Timed iterations, after the one that compiles."""
    decode_batches: tuple[int, ...] = ()
    """Batch sizes at which generation alone is timed as well."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main() -> None:
    work = flags.parse(Work(), sys.argv[1:], prog="python benchmarks/ppo.py")
    report = measure(work)
    print(json.dumps(report)) if work.json else show(report)


def measure(work: Work) -> dict[str, Any]:
    """Run the work; everything in seconds, bytes and tokens a second."""
    agent = make_agent(work)
    rng = np.random.default_rng(0)
    loaded = time.perf_counter() - START
    rows = [one_iteration(agent, work, rng, i) for i in range(work.iterations + 1)]
    peak_memory = peak_bytes()
    first, *timed = rows
    report: dict[str, Any] = {
        "work": asdict(work),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax")},
        "start_to_end_of_first_iteration_s": loaded + first["seconds"]["iteration"],
        "first_iteration_s": first["seconds"]["iteration"],
        "peak_memory_gib": peak_memory / 2**30,
        "checkpoint_gib": sum(x.nbytes for x in jax.tree.leaves(agent.state)) / 2**30,
    }
    if not timed:
        return report
    flops, read = matmul_speed(work.dtype), read_speed()
    seconds = {name: median(row["seconds"][name] for row in timed) for name in first["seconds"]}
    floors = [
        floor_seconds(agent.network.config, work, row["lengths"], flops, read) for row in timed
    ]
    floor = {name: median(row[name] for row in floors) for name in seconds}
    num_tokens = median(sum(map(sum, row["lengths"])) for row in timed)
    generated = median(sum(response for _, response in row["lengths"]) for row in timed)
    return report | {
        "seconds": seconds,
        "floor_seconds": floor,
        "times_its_floor": {name: seconds[name] / floor[name] for name in seconds},
        "tokens_per_s": num_tokens / seconds["iteration"],
        "generated_tokens_per_s": generated / seconds["rollout"],
        "compile_s": first["seconds"]["iteration"] - seconds["iteration"],
        "matmul_gflops": flops / 1e9,
        "read_gb_per_s": read / 1e9,
        "decode": [time_decoding(agent, work, rng, size) for size in work.decode_batches],
    }


def make_agent(work: Work) -> PPOAgent:
    types = {"dtype": work.dtype, "param_dtype": work.param_dtype}
    if work.model in SHAPES:
        shape = SHAPES[work.model]
        network = jax.jit(lambda: PolicyValueNetwork(shape, rngs=nnx.Rngs(0), **types))()
    else:
        network = load_pretrained(work.model, **types)
    # Not the iterations that are timed: the schedule is compiled in, so the cache would not serve.
    return PPOAgent(
        network, task_of(work, network.config.vocab_size), config_of(work), num_iterations=1000
    )


def task_of(work: Work, vocab_size: int) -> TextTask:
    endings = ends_of_sequence(work, vocab_size)
    rng = np.random.default_rng(1)
    return make_task(
        tokenizer=numbered_tokenizer(vocab_size),
        prompts=["1"],
        reward=lambda batch: rng.normal(size=len(batch)).astype(np.float32),
        max_prompt_length=work.prompt_length,
        max_new_tokens=work.response_length,
        min_new_tokens=0 if work.mean_response_length else work.response_length,
        eos_token_ids=range(vocab_size - endings, vocab_size),
        vocab_size=vocab_size,
    )


def config_of(work: Work) -> TrainConfig:
    return TrainConfig(
        ppo=PPOConfig(
            batch_size=work.batch_size,
            num_epochs=work.epochs,
            num_minibatches=work.minibatches,
            num_microbatches=work.microbatches,
            num_packed_sizes=work.packed_sizes,
            critic=work.critic,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            freeze_embeddings=work.freeze_embeddings,
            num_frozen_layers=work.num_frozen_layers,
            lora_rank=work.lora_rank,
        ),
        run=RunConfig(remat=work.remat),
    )


def ends_of_sequence(work: Work, vocab_size: int) -> int:
    """How many of the ids must end a response for lengths to have the mean that is asked for.

    The model is taken for uniform: a geometric length with hazard p, cut off at T, has the mean
    (1 - (1-p)^T) / p.
    """
    if work.mean_response_length is None:
        return 1
    hazards = np.arange(1, vocab_size) / vocab_size
    means = (1 - (1 - hazards) ** work.response_length) / hazards
    return int(np.argmin(abs(means - work.mean_response_length))) + 1


def numbered_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of as many words as the model has ids."""
    words = {str(i): i for i in range(vocab_size)}
    model = tokenizers.models.WordLevel(words, unk_token="0")
    return Tokenizer(tokenizers.Tokenizer(model), eos_token_ids=(0,), config={})


def random_prompts(
    agent: PPOAgent, work: Work, rng: np.random.Generator, size: int
) -> list[Prompt]:
    shortest = work.prompt_length if work.mean_response_length is None else 1
    lengths = rng.integers(shortest, work.prompt_length + 1, size)
    vocab_size = agent.task.rules.vocab_size
    ids = rng.integers(1, vocab_size // 2, (size, work.prompt_length)).astype(np.int32)
    return [Prompt("", row[:length], {}, 0) for row, length in zip(ids, lengths, strict=True)]


def one_iteration(
    agent: PPOAgent, work: Work, rng: np.random.Generator, number: int
) -> dict[str, Any]:
    start = time.perf_counter()
    prompts = random_prompts(agent, work, rng, work.batch_size)
    episodes = agent.actor.respond(agent.params, prompts, jax.random.key(number))
    metrics = agent.update(episodes)
    assert metrics["update/epochs"] == work.epochs
    if work.mean_response_length is None:
        assert metrics["rollout/length_mean"] == work.response_length
    seconds = {
        "rollout": episodes.rollout_s,
        "update": metrics["time/update_s"],
        "iteration": time.perf_counter() - start,
    }
    return {"seconds": seconds, "lengths": lengths_of(episodes)}


def lengths_of(experience: Experience) -> list[tuple[int, int]]:
    return [(len(e.prompt.ids), len(e.completion_ids)) for e in experience.episodes]


def time_decoding(
    agent: PPOAgent, work: Work, rng: np.random.Generator, size: int
) -> dict[str, float]:
    """Generation alone, all prompts different, after one run that compiles."""
    seconds, generated = [], []
    for i in range(4):
        prompts = random_prompts(agent, work, rng, size)
        episodes = agent.actor.respond(agent.params, prompts, jax.random.key(i))
        seconds.append(episodes.rollout_s)
        generated.append(sum(response for _, response in lengths_of(episodes)))
    rate = median(n / s for n, s in zip(generated[1:], seconds[1:], strict=True))
    return {"batch_size": size, "generated_tokens_per_s": rate}


def floor_seconds(
    config: DecoderConfig,
    work: Work,
    lengths: list[tuple[int, int]],
    flops: float,
    bandwidth: float,
) -> dict[str, float]:
    """The least time each phase can take on the real tokens of these prompts and responses.

    Multiply-adds of the matrix products, those of causal attention included; while decoding, the
    bytes of the weights once a step, and of each row's keys and values up to its place. What is
    frozen needs no gradient of its own, and below the lowest layer that learns there is none.
    With adapters the model itself is frozen: gradients pass through its products and attention, and
    only the adapters' own products have all three. The reference has none, and in a rollout they
    are in the weights.
    """
    d, head = config.hidden_size, config.head_dim
    attention = d * head * (config.num_attention_heads + config.num_key_value_heads) * 2
    num_layers = config.num_hidden_layers
    body = attention + 3 * d * config.intermediate_size  # a layer
    projection = config.vocab_size * d
    mixing = config.num_attention_heads * head  # a pair of positions, a layer
    prompts = sum(prompt for prompt, _ in lengths)
    responses = sum(response for _, response in lengths)
    pairs = sum((prompt + response) ** 2 / 2 for prompt, response in lengths)
    products, attended = 2 * body * (prompts + responses), 4 * mixing * pairs
    logits = 2 * projection * responses
    forward = num_layers * (products + attended) + logits
    itemsize = jnp.dtype(work.dtype).itemsize
    steps = max(response for _, response in lengths)
    weights = itemsize * (num_layers * body + projection) * steps
    kept = 2 * itemsize * num_layers * config.num_key_value_heads * head
    cache = kept * sum(response * (prompt + response / 2) for prompt, response in lengths)
    rollout = forward / flops + (weights + cache) / bandwidth
    learning = num_layers - work.num_frozen_layers
    passed = 0 if work.freeze_embeddings else work.num_frozen_layers
    backward = learning * 2 * (products + attended) + passed * (products + 2 * attended)
    backward += logits * (1 if work.freeze_embeddings else 2)
    adapters = 0  # of all layers that have some, forward
    if work.lora_rank is not None:
        inner = head * (config.num_attention_heads + config.num_key_value_heads)
        widths = 2 * (2 * d + inner) + 3 * (d + config.intermediate_size)  # in and out, of seven
        adapters = learning * 2 * work.lora_rank * widths * (prompts + responses)
        backward = learning * (products + 2 * attended) + 2 * adapters + logits
    # Old and reference log-probabilities, then forward and backward once an epoch.
    learned = forward + adapters
    update = (forward + learned + work.epochs * (learned + backward)) / flops
    return {"rollout": rollout, "update": update, "iteration": rollout + update}


def matmul_speed(dtype: str) -> float:
    """Best FLOP/s of a large matrix product in the compute type."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
    return 2 * size**3 / best_seconds(jax.jit(jnp.matmul), x, x)


def read_speed(size: int = 2**27) -> float:
    """Best bytes read a second by a sum over a large array."""
    x = jnp.asarray(np.random.default_rng(0).random(size, np.float32))
    return x.nbytes / best_seconds(jax.jit(jnp.sum), x)


def best_seconds(function: Callable[..., jax.Array], *arguments: jax.Array, runs: int = 7) -> float:
    function(*arguments).block_until_ready()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_bytes() -> int:
    """Of the device where it counts its memory, else of the process."""
    statistics = jax.devices()[0].memory_stats() or {}
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return statistics.get("peak_bytes_in_use", of_process)


def show(report: dict[str, Any]) -> None:
    table = Table("phase", "seconds", "floor", "times its floor")
    for name, seconds in report["seconds"].items():
        numbers = (seconds, report["floor_seconds"][name], report["times_its_floor"][name])
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console().print(table)
    for name, value in report.items():
        if isinstance(value, float):
            print(f"{name}: {value:.2f}")
    for row in report["decode"]:
        print("decoding, batch {batch_size}: {generated_tokens_per_s:.0f} tokens/s".format(**row))


if __name__ == "__main__":
    main()
