"""What models of 0.5 to 8 billion parameters need on 1 to 256 devices, on paper.

    python benchmarks/scale.py --device h100
    python benchmarks/scale.py --device v5e
    python benchmarks/scale.py --device v5e --compiled

Nothing is run: parameters are counted, and the rest is arithmetic over published peaks. With
`--compiled`, XLA compiles the programs for so many chips of a TPU v5e (`pip install -e '.[tpu]'`;
an hour for all of them), and what they hold and send is read from them. A chip has 4 rows at a time
in the update, of 192 + 512 positions, and 3B and 8B recompute activations.

An iteration is one of PPO on GSM8K's lengths: prompts of 103 tokens, responses of 275 on average
and at most 512, one epoch of 256 rows, or of four a device where that is more.

- **State**: parameters, two moments and reference in float32, 16 bytes a parameter, over the
  shards.
- **Whole**: what every device has of all parameters while it writes, in bfloat16, 2 bytes each.
- **Links**: each part of a batch gathers the parameters in bfloat16 for the old and the reference
  log-probabilities and for the forward and the backward pass, scatters gradients in float32, and
  copies add theirs up. Shards share a host as long as they fit into one.
- **Arithmetic**: the floor of `benchmarks/ppo.py`, at two fifths of the peak.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import jax
from compile_ahead import GIB, Iteration, mesh_of, v5e_topology
from compiled_program import CompiledProgram
from flax import nnx
from ppo import SHAPES, Work, floor_seconds
from rich.console import Console
from rich.table import Table

from ppo_jax import flags
from ppo_jax.models import DecoderConfig, PolicyValueNetwork

USED = 0.4
"""Share of the peak that large matrix products of a whole iteration are taken to reach."""
PROMPT, RESPONSE, LONGEST = 103, 275, 512


@dataclass(frozen=True)
class Device:
    """A device as its maker describes it, in bfloat16, bytes and seconds."""

    flops: float
    memory: float
    memory_bandwidth: float
    link: float  # one direction, to devices of the same host or slice
    far_link: float  # to those of other hosts
    in_a_host: int
    rows_at_once: int  # of an update, so that residuals fit
    price: float  # dollars an hour, about what it is rented for on demand in 2026


DEVICES = {
    "h100": Device(989e12, 80e9, 3.35e12, 450e9, 50e9, 8, 16, 3.0),
    "v5e": Device(197e12, 16e9, 0.82e12, 200e9, 200e9, 256, 4, 1.2),
}
PLACES = {
    "random:qwen2.5-0.5b": ((1, 1), (8, 1), (8, 8), (64, 8)),
    "random:qwen2.5-1.5b": ((1, 1), (8, 1), (8, 8), (64, 8)),
    "random:qwen2.5-3b": ((8, 1), (8, 8), (64, 8), (256, 8)),
    "random:qwen3-8b": ((8, 8), (64, 8), (64, 64), (256, 8), (256, 64)),
}
"""Devices and shards of each model."""


@dataclass(frozen=True)
class Arguments:
    """What models need on many devices, on paper."""

    device: Literal["h100", "v5e"] = "h100"
    """The device."""
    compiled: bool = False
    """Compile the programs for a v5e, and read what they hold and send."""
    models: tuple[str, ...] = tuple(PLACES)
    """Which to compile."""
    num_devices: tuple[int, ...] = (8, 64, 256)
    """For how many devices to compile."""
    programs: tuple[str, ...] = ("rollout", "update")
    """Which programs to compile."""


def main() -> None:
    arguments = flags.parse(Arguments(), sys.argv[1:], prog="python benchmarks/scale.py")
    if arguments.compiled:
        show_compiled(arguments)
    else:
        show_arithmetic(DEVICES[arguments.device])


def show_arithmetic(device: Device) -> None:
    table = Table(
        "model", "devices", "shards", "state, GB", "whole, GB", "fits", "rows", "arithmetic, s",
        "links, s", "device hours for 435 iterations", "dollars",
    )  # fmt: skip
    for model, places in PLACES.items():
        for num_devices, num_shards in places:
            cells = row(SHAPES[model], device, num_devices, num_shards)
            table.add_row(model.removeprefix("random:"), str(num_devices), str(num_shards), *cells)
    Console(width=130).print(table)


def show_compiled(arguments: Arguments) -> None:
    jax.config.update("jax_platforms", "cpu")  # no device is looked for
    table = Table(
        "model", "devices", "shards", "parts", "rollout, GiB", "arguments, GiB", "update, GiB",
        "collectives of an update", "GB on links",
    )  # fmt: skip
    for model in arguments.models:
        for num_devices, num_shards in PLACES[model]:
            if num_devices in arguments.num_devices and num_shards > 1:
                cells = compiled_row(model, num_devices, num_shards, arguments.programs)
                print(model, num_devices, num_shards, *cells, sep="  ", file=sys.stderr)
                places = str(num_devices), str(num_shards)
                table.add_row(model.removeprefix("random:"), *places, *cells)
    Console(width=130).print(table)


def compiled_row(
    model: str, num_devices: int, num_shards: int, names: tuple[str, ...]
) -> list[str]:
    """Of a micro-batch of 4 rows a chip; all of a chip's responses are written at once."""
    config = SHAPES[model]
    rows = max(256, 4 * num_devices)
    work = Work(
        model,
        batch_size=rows,
        microbatches=rows // num_devices // 4,
        prompt_length=704 - LONGEST,
        response_length=LONGEST,
        epochs=1,
        dtype="bfloat16",
        remat=num_parameters(config) > 2e9,
    )
    mesh = mesh_of(v5e_topology(num_devices), num_devices, num_shards)
    cells = dict.fromkeys(("rollout", "arguments", "update", "collectives", "links"), "")
    for name, compiled in Iteration(work, mesh).programs(names):
        memory = compiled.memory_analysis()
        cells[name] = f"{memory.peak_memory_in_bytes / GIB:.1f}"
        if name == "update":
            cost = CompiledProgram(compiled.as_text()).cost()
            counts = cost.collectives.items()
            cells["arguments"] = f"{memory.argument_size_in_bytes / GIB:.1f}"
            cells["collectives"] = ", ".join(f"{count} {kind}" for kind, count in counts)
            cells["links"] = f"{cost.linked / 1e9:.1f}"
    return [str(work.microbatches), *cells.values()]


def row(config: DecoderConfig, device: Device, num_devices: int, num_shards: int) -> list[str]:
    """The cells of a model on so many devices."""
    count = num_parameters(config)
    state, whole = 16 * count / num_shards, 2 * count
    gradients = 4 * count / num_shards
    rows = max(256, 4 * num_devices)
    arithmetic = iteration_seconds(config, device, rows // num_devices)
    links = link_seconds(count, device, rows // num_devices, num_devices, num_shards)
    fits = max(state + gradients, state + whole) < 0.8 * device.memory  # the rest is work
    hours = 435 * (arithmetic + links) * num_devices / 3600
    return [
        f"{state / 1e9:.1f}",
        f"{whole / 1e9:.1f}",
        "yes" if fits else "no",
        str(rows),
        f"{arithmetic:.2f}",
        f"{links:.2f}",
        f"{hours:.1f}" if fits else "",
        f"{hours * device.price:.1f}" if fits else "",
    ]


def num_parameters(config: DecoderConfig) -> int:
    network = jax.eval_shape(lambda: PolicyValueNetwork(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(network)))


def iteration_seconds(config: DecoderConfig, device: Device, rows: int) -> float:
    """Of the rows of one device."""
    lengths = [(PROMPT, RESPONSE)] * (rows - 1) + [(PROMPT, LONGEST)]
    work = Work(dtype="bfloat16", epochs=1)
    floor = floor_seconds(config, work, lengths, USED * device.flops, device.memory_bandwidth)
    return floor["iteration"]


def link_seconds(count: int, device: Device, rows: int, num_devices: int, num_shards: int) -> float:
    """What one device waits for others in an iteration, if nothing is hidden behind arithmetic."""
    parts = -(-rows // device.rows_at_once)
    others = (num_shards - 1) / num_shards
    gathered = (4 * parts + 1) * 2 * count * others
    scattered = parts * 4 * count * others
    copies = num_devices // num_shards
    added = 2 * (copies - 1) / copies * 4 * count / num_shards
    near, far = device.link, device.far_link
    return (gathered + scattered) / (near if num_shards <= device.in_a_host else far) + added / (
        near if num_devices <= device.in_a_host else far
    )


if __name__ == "__main__":
    main()
