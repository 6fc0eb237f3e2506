"""Time and memory that saving and restoring a state take beside the state itself.

    python benchmarks/checkpoints.py --gigabytes 1

The state has the arrays of a 24-layer decoder and of its Adam moments, in float32, of random
numbers. Memory is the process's resident memory, at its highest less what it was before (Linux).
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from ppo_jax.algorithm import no_moments
from ppo_jax.learning.batch import Controls
from ppo_jax.learning.learner import TrainState
from ppo_jax.runs.checkpoints import Checkpoints

GIGA = 1e9


def make_state(gigabytes: float) -> TrainState:
    """Embeddings and stacked layers in the proportions of Qwen2.5-0.5B, three times."""
    shares = {"embed_tokens": 0.28, "gate": 0.21, "up": 0.21, "down": 0.21, "q": 0.04, "o": 0.04}
    numbers = gigabytes * GIGA / 4 / 3

    def tree(seed: int) -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        return {
            name: jax.random.normal(jax.random.fold_in(key, i), (24, int(share * numbers / 24)))
            for i, (name, share) in enumerate(shares.items())
        }

    state = TrainState(
        params=tree(0),
        opt_state=(tree(1), tree(2)),
        controls=Controls(jnp.float32(0.05), no_moments()),
        warmup=None,
        reference=None,
        root_key=jax.random.key_data(jax.random.key(0)),
        iteration=jnp.int32(1),
        nonfinite_in_a_row=jnp.int32(0),
    )
    return jax.block_until_ready(state)


def measure(act: Callable[[], object]) -> tuple[object, float, float]:
    """What `act` gives, its seconds, and its gigabytes at the highest."""
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest starts anew
    start = time.perf_counter()
    result = jax.block_until_ready(act())
    return result, time.perf_counter() - start, _memory("VmHWM") - before


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024 / GIGA


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    state = make_state(arguments.gigabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / GIGA
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoints = Checkpoints(Path(folder), keep=1)
        _, seconds, peak = measure(lambda: checkpoints.save(state, {}))
        print(f"state {size:.2f} GB; save {seconds:.1f} s, {peak / size:.2f} of it; ", end="")
        _, seconds, peak = measure(lambda: checkpoints.restore(state))
        print(f"restore {seconds:.1f} s, {peak / size:.2f} of it")


if __name__ == "__main__":
    main()
