"""How much memory training takes with each way to make it smaller.

    python benchmarks/memory.py
    python benchmarks/memory.py --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/memory.py --gpu

Of a shape, the programs of an iteration are compiled, not run, and no array is allocated. What is
on the device all the time (the state, the reference model and what is frozen) is known exactly;
what a program needs beside it is what XLA says. "peak" is their sum. On a CPU, a process takes
more: Python, JAX, the libraries, the compiled programs and what malloc keeps are not in it.

A model in a file is trained, with each set of flags in a process of its own, and its peak is what
the operating system counted, loading included.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import suite
from compile_ahead import Iteration, h100
from ppo import SHAPES, Work
from rich.console import Console
from rich.table import Table

from ppo_jax import flags

GIB = 2**30
PROGRAM = sys.executable, str(Path(__file__).with_name("ppo.py")), "--json", "--iterations", "1"

SMALLEST = {"freeze_embeddings": True, "num_frozen_layers": 12}
FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "--remat": {"remat": True},
    "--num-microbatches 4": {"microbatches": 4},
    "--critic separate": {"critic": "separate"},
    "--freeze-embeddings": {"freeze_embeddings": True},
    "--num-frozen-layers 12": {"num_frozen_layers": 12},
    "--freeze-embeddings --num-frozen-layers 12": SMALLEST,
    "--lora-rank 16": {"lora_rank": 16},
    "--lora-rank 16 --critic separate": {"lora_rank": 16, "critic": "separate"},
    "--lora-rank 16 --param-dtype bfloat16": {"lora_rank": 16, "param_dtype": "bfloat16"},
    "--param-dtype bfloat16": {"param_dtype": "bfloat16"},
    "--param-dtype bfloat16 --remat": {"param_dtype": "bfloat16", "remat": True},
    "--param-dtype bfloat16 --freeze-embeddings --num-frozen-layers 12": {
        "param_dtype": "bfloat16",
        **SMALLEST,
    },
}
"""Flags of ppo-train, and what they are here."""


@dataclass(frozen=True)
class Arguments:
    """Memory that training takes, by the flags of ppo-train."""

    batch_size: int = 4
    """B."""
    prompt_length: int = 80
    """P."""
    response_length: int = 24
    """T."""
    model: str = "random:qwen2.5-0.5b"
    """A shape of benchmarks/ppo.py, for which memory is computed; or a folder or a .gguf file, with
    which it is measured."""
    gpu: bool = False
    """Compile for an H100 that need not be there, and one iteration of PPO's usual work on one: 256
    x (512 + 512) in 4 minibatches, a critic of its own, computed in bfloat16."""


def main() -> None:
    arguments = flags.parse(Arguments(), sys.argv[1:], prog="python benchmarks/memory.py")
    if arguments.model in SHAPES:
        compute(arguments)
    else:
        measure(arguments)


def compute(arguments: Arguments) -> None:
    columns = "reference", "state", "rollout", "prepare", "update", "peak", "checkpoint"
    table = Table("flags", *columns, title="GiB")
    mesh = h100() if arguments.gpu else None
    for name, work in works(arguments):
        sizes = memory(Iteration(work, mesh))
        table.add_row(name or "none", *(f"{sizes[column] / GIB:.2f}" for column in columns))
    Console(width=110).print(table)


def measure(arguments: Arguments) -> None:
    table = Table("flags", "peak GiB", "checkpoint GiB", "seconds an iteration", "of its floor")
    for name, work in works(arguments):
        changed = {k: v for k, v in asdict(work).items() if v != getattr(Work(), k)}
        report = suite.run([*PROGRAM, *suite.words(changed)], suite.common_environment())
        numbers = (
            report["peak_memory_gib"],
            report["checkpoint_gib"],
            report["seconds"]["iteration"],
            report["times_its_floor"]["iteration"],
        )
        table.add_row(name or "none", *(f"{number:.1f}" for number in numbers))
        print(name or "none", *(f"{number:.2f}" for number in numbers), sep="  ", file=sys.stderr)
    Console(width=110).print(table)


def works(arguments: Arguments) -> Iterator[tuple[str, Work]]:
    if arguments.gpu:
        shape = {"batch_size": 256, "prompt_length": 512, "response_length": 512, "epochs": 1}
        # Rows that are not shared take the most.
        ways = {"critic": "separate", "dtype": "bfloat16", "minibatches": 4}
        for microbatches, remat in ((4, False), (8, False), (8, True)):
            work = Work(arguments.model, **shape, **ways, microbatches=microbatches, remat=remat)
            yield f"--num-microbatches {microbatches}" + remat * " --remat", work
        return
    shape = {
        "batch_size": arguments.batch_size,
        "prompt_length": arguments.prompt_length,
        "response_length": arguments.response_length,
    }
    for name, changes in FLAGS.items():
        yield name, Work(arguments.model, **shape, **changes)


def memory(iteration: Iteration) -> dict[str, int]:
    """Bytes of what is there all the time, at work in each program beside it, and at most."""
    # The policy's first parameters are the reference's, and what is frozen is both's.
    # A frozen critic lies on the policy's own arrays.
    frozen = size_of({name: x for name, x in iteration.frozen.items() if name != "critic"})
    reference = size_of(iteration.params["backbone"]) + frozen
    state = size_of(iteration.state)
    at_work = {}
    for name, compiled in iteration.programs():
        needs = compiled.memory_analysis()
        made = needs.output_size_in_bytes - needs.alias_size_in_bytes
        at_work[name] = needs.temp_size_in_bytes + made
    peak = reference + state + max(at_work.values())
    return {"reference": reference, "state": state, **at_work, "peak": peak, "checkpoint": state}


def size_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
