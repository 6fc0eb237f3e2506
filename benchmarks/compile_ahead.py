"""Compile an iteration for an H100 or a TPU v5e that is not there, and say what the programs cost.

    pip install -e '.[cuda12,test]'
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/compile_ahead.py --target h100
    pip install -e '.[tpu,test]'
    python benchmarks/compile_ahead.py --target v5e

XLA needs a description of the device, not the device. What it cannot do without one is to time
kernels and choose the fastest, so programs for a GPU differ a little from those that it would run.

"decode" is one step of generation in all rows, "update" one optimizer step; both are bodies of
loops, read by `compiled_program.py`, which says what counts as moved. The least that a decode step
can move is the weights, in the compute type, and the keys and values of real tokens, at half of the
responses' limit; "beyond caches" leaves out what a GPU's cache holds from one kernel to the next.
Where the loop is cut by how much of the caches is in use, a step is the mean of its parts.
"memory" is the most that is held at once, arguments included. The least of an update, on each
device, is its arguments, a gradient of every parameter that learns, and what one micro-batch keeps
for the backward pass.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from compiled_program import CompiledProgram, Cost
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh
from ppo import SHAPES, Work, config_of, task_of
from rich.console import Console
from rich.table import Table

from ppo_jax import compilation, flags
from ppo_jax.generation.rollout import rollout
from ppo_jax.learning.frozen import join, partition
from ppo_jax.learning.learner import Learner
from ppo_jax.mesh import ROWS, SHARDS, gather, on_own_rows, replicated, shardings
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


GIB = 2**30
CACHED = 2**22
"""Bytes that stay in a GPU's cache until the next kernel reads them; an H100's second has 50 MB."""
PROGRAMS = "rollout", "prepare", "update"


@dataclass(frozen=True)
class Arguments:
    """Compile an iteration for a device that need not be there."""

    target: Literal["h100", "v5e"] = "h100"
    """The device: a GPU or a TPU."""
    works: tuple[str, ...] = ("short", "long")
    """short, 64 x (128 + 128); long, 256 x (192 + 512); readme, what the README runs on a GPU."""
    model: str = "random:qwen2.5-0.5b"
    """A shape of benchmarks/ppo.py."""
    num_devices: int = 1
    """Devices that the work is split over; of a TPU 1, 8, 16, 64 or 256."""
    num_shards: int = 1
    """Devices that parameters, moments and reference are cut over."""
    remat: bool = False
    """Recompute activations in the backward pass."""
    packed_sizes: int = 8
    """Of the longer work; a branch for each is compiled."""
    slots: int | None = None
    """Rows that are written at a time on each device, --rollout-slots of the training script; None
    writes all."""
    programs: tuple[str, ...] = PROGRAMS
    """Which of an iteration's programs: rollout, prepare, update; or learn, which is what a run
    compiles: prepare and update together."""
    dump: Path | None = None
    """Folder for the compiled programs, as text."""


def works(arguments: Arguments) -> dict[str, Work]:
    """As in `suite.py --machine gpu`; on a TPU, whose memory is a fifth, in more micro-batches."""
    base = Work(arguments.model, dtype="bfloat16", batch_size=64, remat=arguments.remat)
    named = {
        "short": replace(base, prompt_length=128, response_length=128),
        "long": replace(
            base,
            batch_size=256,
            prompt_length=192,
            response_length=512,
            epochs=1,
            packed_sizes=arguments.packed_sizes,
        ),
        # Rows that are not shared take the most.
        "readme": replace(base, prompt_length=256, response_length=256, minibatches=4),
    }
    at_once = {"h100": (64, 16, 16), "v5e": (16, 4, 8)}[arguments.target]  # rows on a device
    for (name, work), rows in zip(named.items(), at_once, strict=True):
        of_device = work.batch_size // work.minibatches // arguments.num_devices
        named[name] = replace(work, microbatches=max(of_device // rows, 1))
    return {name: named[name] for name in arguments.works}


def main() -> None:
    arguments = flags.parse(Arguments(), sys.argv[1:], prog="python benchmarks/compile_ahead.py")
    jax.config.update("jax_platforms", "cpu")  # the device is not looked for
    topology = {"h100": h100_topology, "v5e": v5e_topology}[arguments.target]
    mesh = mesh_of(topology(arguments.num_devices), arguments.num_devices, arguments.num_shards)
    table = Table(*COLUMNS)
    for name, work in works(arguments).items():
        iteration = Iteration(work, mesh, arguments.slots)
        for program, compiled in iteration.programs(arguments.programs):
            if arguments.dump is not None:
                arguments.dump.mkdir(parents=True, exist_ok=True)
                (arguments.dump / f"{name}_{program}.txt").write_text(compiled.as_text())
            size = f"{work.batch_size} x ({work.prompt_length} + {work.response_length})"
            table.add_row(size, program, *figures(iteration, program, compiled))
    Console(width=140).print(table)


COLUMNS = (
    "work", "program", "kernels", "GB moved", "of its least", "beyond caches", "collectives",
    "GB on links", "arguments, GiB",
    "memory, GiB", "memory, of its least",
)  # fmt: skip


def figures(iteration: "Iteration", name: str, compiled: Any) -> list[str]:
    """A row of the table: one turn of the costliest loop, which the program spends its time in."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    program = CompiledProgram(text)
    arguments, held = memory.argument_size_in_bytes, memory.peak_memory_in_bytes
    least_moved = beyond = least_held = ""
    if name == "prepare":
        cost = program.cost()
    elif name == "rollout":
        cost = iteration.decode_step(program)
        least_moved = f"{cost.bytes / iteration.least_moved():.2f}"
        beyond_caches = iteration.decode_step(CompiledProgram(text, CACHED))
        beyond = f"{beyond_caches.bytes / iteration.least_moved():.2f}"
    else:
        cost = max(map(program.cost, program.loops(of_unknown_length=False)), key=lambda x: x.bytes)
    if name in ("update", "learn"):
        least_held = f"{held / (arguments + iteration.least_kept()):.2f}"
    return [
        str(cost.kernels),
        f"{cost.bytes / 1e9:.2f}",
        least_moved,
        beyond,
        ", ".join(f"{count} {kind}" for kind, count in cost.collectives.items()) or "none",
        f"{cost.linked / 1e9:.2f}" if cost.linked else "",
        f"{arguments / GIB:.1f}",
        f"{held / GIB:.1f}",
        least_held,
    ]


def h100() -> Mesh:
    """One H100."""
    return mesh_of(h100_topology(1), 1, 1)


def h100_topology(num_devices: int) -> topologies.TopologyDescription:
    return topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x1x{num_devices}"
    )


def v5e_topology(num_devices: int) -> topologies.TopologyDescription:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine of Google's is asked
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor is there one to fight for
    slices = {1: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}
    return topologies.get_topology_desc(f"v5e:{slices[num_devices]}", platform="tpu")


def mesh_of(topology: topologies.TopologyDescription, num_devices: int, num_shards: int) -> Mesh:
    devices = np.array(topology.devices[:num_devices])
    return Mesh(devices.reshape(num_devices // num_shards, num_shards), ROWS)


class Iteration:
    """The arrays and the programs of an iteration, from shapes alone: nothing is allocated.

    Args:
        mesh: of devices that need not be there; None compiles for this machine.
        num_slots: rows that are written at a time on each device; None writes all.
    """

    def __init__(self, work: Work, mesh: Mesh | None = None, num_slots: int | None = None):
        self._whole = replicated(mesh)
        self._mesh = None if mesh is None or mesh.size == 1 else mesh
        self._num_devices, self._num_shards = 1, 1
        if self._mesh is not None:
            self._num_devices, self._num_shards = self._mesh.size, self._mesh.shape[SHARDS]
        self._jit = compilation.jit if mesh is None else _jit_for_another_device
        self.work, self.config = work, config_of(work)
        self._num_slots = num_slots
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
        self.params, self.frozen = self._placed(params), self._placed(frozen)
        self.learner = Learner(
            self.graphdef,
            task_of(work, shape.vocab_size).rules,
            self.config.ppo,
            optimizer,
            num_iterations=1000,
            remat=work.remat,
            mesh=self._mesh,
        )
        start = jax.eval_shape(lambda params: self.learner.init(params, 0), self.params)
        self.state = self._placed(start)

    def _placed(self, tree: Any) -> Any:
        where = jax.tree.map(lambda x: self._whole, tree)
        if self._mesh is not None:
            where = shardings(tree, self._mesh)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            where,
        )

    def programs(self, names: Collection[str] = PROGRAMS) -> Iterator[tuple[str, Any]]:
        """(name, compiled) of those programs that `names` has."""
        work, learner, state = self.work, self.learner, self.state

        def respond(params: nnx.State, ids: Any, length: Any, key: Any) -> Any:
            def of_rows(whole: Any, rows: Any) -> Any:
                params, key = whole
                ids, length, number = rows
                return rollout(
                    nnx.merge(self.graphdef, gather(params)),
                    ids,
                    length,
                    key,
                    rules=learner.rules,
                    prompt_number=number,
                    compacts_rows=self.config.ppo.num_packed_sizes > 1,
                    num_slots=self._num_slots,
                    bounds_reads=self._whole is not None,
                )

            rows = ids, length, jnp.arange(len(ids))
            return on_own_rows(of_rows, self._mesh)((params, key), rows)

        whole = join(self.params, self.frozen)
        ids, length, score, key = self._placed(
            (
                jax.ShapeDtypeStruct((work.batch_size, work.prompt_length), jnp.int32),
                jax.ShapeDtypeStruct((work.batch_size,), jnp.int32),
                jax.ShapeDtypeStruct((work.batch_size,), jnp.float32),
                jax.eval_shape(lambda: jax.random.key(0)),
            )
        )
        if "rollout" in names:
            yield "rollout", self._jit(respond).lower(whole, ids, length, key).compile()
        responses = self._placed(jax.eval_shape(respond, whole, ids, length, key))
        scored = (whole, whole["backbone"], state.controls, responses, score)

        def prepare(*scored: Any) -> Any:  # without gradients that come along
            return learner.prepare(*scored)[0]

        if "prepare" in names:
            yield "prepare", self._jit(prepare).lower(*scored).compile()
        batch = self._placed(jax.eval_shape(prepare, *scored)).batch
        if "update" in names:
            update = self._jit(learner.update, donate_argnums=0)
            yield "update", update.lower(state, batch, key, self.frozen).compile()
        if "learn" in names:
            learn = self._jit(learner.learn, donate_argnums=0)
            initial = self.params["backbone"]
            arguments = state, initial, responses, score, None, key, self.frozen
            yield "learn", learn.lower(*arguments).compile()

    def decode_step(self, program: CompiledProgram) -> Cost:
        """Of a rollout, with all rows: the mean of its loops, each of which reads other slots."""
        state = f"s32[{self._rows()},{self.learner.rules.max_length}]"
        costs = [program.cost(body) for body in program.loops() if program.carries(body, state)]
        total = sum(costs, Cost())
        return replace(costs[-1], bytes=total.bytes // len(costs))

    def _rows(self) -> int:
        """That a device writes at a time."""
        rows = self.work.batch_size // self._num_devices
        return rows if self._num_slots is None else min(rows, self._num_slots)

    def least_moved(self) -> int:
        """Bytes of a decode step, all prompts and half of the responses being there."""
        work, shape = self.work, SHAPES[self.work.model]
        itemsize = jnp.dtype(work.dtype).itemsize
        weights = sum(x.size for x in jax.tree.leaves(self.params["backbone"]))
        kept = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
        tokens = self._rows() * (work.prompt_length + work.response_length // 2)
        return itemsize * (weights + kept * tokens)

    def least_kept(self) -> int:
        """Bytes of the gradients, and of the residuals of a micro-batch's layers."""
        work, shape = self.work, SHAPES[self.work.model]
        gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.params))
        tokens = work.batch_size // work.minibatches // work.microbatches // self._num_devices
        tokens *= work.prompt_length + work.response_length
        heads = 2 * shape.num_key_value_heads + shape.num_attention_heads
        products = heads * shape.head_dim + shape.hidden_size + 2 * shape.intermediate_size
        a_token = shape.hidden_size + (0 if work.remat else products)
        itemsize = jnp.dtype(work.dtype).itemsize
        residuals = itemsize * shape.num_hidden_layers * tokens * a_token
        return gradients // self._num_shards + residuals


def _jit_for_another_device(function: Callable[..., Any], **options: Any) -> Any:
    """`compilation.jit`, which asks what device this machine has, without its options for it."""

    def as_written(*args: Any) -> Any:
        with compilation.float32_products():
            return function(*args)

    return jax.jit(as_written, **options)


if __name__ == "__main__":
    main()
