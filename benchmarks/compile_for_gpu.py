"""Compile the GPU's works for an H100 that is not there, and say how much of its memory they take.

    pip install -e '.[cuda12,test]'
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/compile_for_gpu.py

XLA needs a description of the GPU, not the GPU. What it cannot do without one is to time kernels
and choose the fastest, so programs differ a little from those that a GPU would run.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ppo import SHAPES, Work, config_of, task_of
from rich.console import Console
from rich.table import Table
from suite import Arguments, cases

from ppo_jax import compilation, flags
from ppo_jax.generation.rollout import rollout
from ppo_jax.learning.frozen import join, partition
from ppo_jax.learning.learner import Learner
from ppo_jax.models import PolicyValueNetwork

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000  device_memory_size: 84929347584
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
"""
"""As XLA describes it, a protocol buffer in text."""


@dataclass(frozen=True)
class Flags:
    """Compile the workloads of `suite.py --machine gpu`."""

    dump: Path | None = None
    """Folder for the compiled programs, as text."""


def main() -> None:
    dump = flags.parse(Flags(), sys.argv[1:], prog="python benchmarks/compile_for_gpu.py").dump
    on_gpu = h100()
    table = Table("work", "program", "arguments", "at work", title="GiB")
    for case in cases(Arguments(machine="gpu")):
        for name, compiled in Iteration(Work(**case.flags), on_gpu).programs():
            memory = compiled.memory_analysis()
            sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            table.add_row(case.name, name, *(f"{size / 2**30:.1f}" for size in sizes))
            if dump is not None:
                dump.mkdir(parents=True, exist_ok=True)
                (dump / f"{case.name.split()[0]}_{name}.txt").write_text(compiled.as_text())
    Console().print(table)


def h100() -> NamedSharding:
    """Places arrays on it."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    return NamedSharding(mesh, PartitionSpec())


class Iteration:
    """The arrays and the programs of an iteration, from shapes alone: nothing is allocated.

    Args:
        sharding: of a device that need not be there; None compiles for this machine.
    """

    def __init__(self, work: Work, sharding: NamedSharding | None = None):
        self._placed = lambda tree: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )
        self._jit = compilation.jit if sharding is None else jax.jit
        self.work, self.config = work, config_of(work)
        shape, optimizer = SHAPES[work.model], self.config.optimizer

        def network() -> PolicyValueNetwork:
            return PolicyValueNetwork(
                shape,
                rngs=nnx.Rngs(0),
                dtype=work.dtype,
                param_dtype=work.param_dtype,
                separate_critic=work.critic == "separate",
            )

        self.graphdef, params, frozen = jax.eval_shape(lambda: partition(network(), optimizer))
        self.params, self.frozen = self._placed((params, frozen))
        self.learner = Learner(
            self.graphdef,
            task_of(work, shape.vocab_size).rules,
            self.config.ppo,
            optimizer,
            num_iterations=1000,
            remat=work.remat,
        )
        start = jax.eval_shape(lambda params: self.learner.init(params, 0), self.params)
        self.state = self._placed(start)

    def programs(self) -> Iterator[tuple[str, Any]]:
        """(name, compiled) of the three programs."""
        work, learner, state = self.work, self.learner, self.state

        def respond(params: nnx.State, ids: Any, length: Any, key: Any) -> Any:
            return rollout(
                nnx.merge(self.graphdef, params),
                ids,
                length,
                key,
                rules=learner.rules,
                compacts_rows=self.config.ppo.num_packed_sizes > 1,
            )

        whole = join(self.params, self.frozen)
        ids, length, score, key = self._placed(
            (
                jax.ShapeDtypeStruct((work.batch_size, work.prompt_length), jnp.int32),
                jax.ShapeDtypeStruct((work.batch_size,), jnp.int32),
                jax.ShapeDtypeStruct((work.batch_size,), jnp.float32),
                jax.eval_shape(lambda: jax.random.key(0)),
            )
        )
        yield "rollout", self._jit(respond).lower(whole, ids, length, key).compile()
        responses = self._placed(jax.eval_shape(respond, whole, ids, length, key))
        scored = (whole, whole["backbone"], state.controls, responses, score)
        yield "prepare", self._jit(learner.prepare).lower(*scored).compile()
        batch = self._placed(jax.eval_shape(learner.prepare, *scored)).batch
        update = self._jit(learner.update, donate_argnums=0)
        yield "update", update.lower(state, batch, key, self.frozen).compile()


if __name__ == "__main__":
    main()
