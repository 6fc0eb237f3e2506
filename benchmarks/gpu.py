"""On a GPU, in ten minutes: what `compile_ahead.py` says without one, measured.

    python benchmarks/gpu.py

Of Qwen2.5-0.5B's shape with random weights, computed in bfloat16: generation alone in 1, 16, 64 and
256 rows of 128 + 128 tokens, an iteration of 64 of them, and one of 256 x (104 + 278 of 512). Each
work is a process of `ppo.py`, which measures the machine's own limits beside it: the speed of a
large matrix product and that of reading a large array.

"Of its floor" is the time over the least that the arithmetic and the bytes of real tokens take at
those speeds. The update's floor is arithmetic alone, so its inverse is the share of the peak that
is used (MFU). "Memory, of its least" is the most that the device held over parameters, moments,
reference, gradients and what one micro-batch keeps. A work that is not done in time is given up.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import suite
from compile_ahead import Iteration
from memory import size_of
from ppo import SHAPES, Work, floor_seconds
from rich.console import Console
from rich.table import Table

from ppo_jax import flags

PROGRAM = sys.executable, str(Path(__file__).with_name("ppo.py")), "--json"
GIB = 2**30


@dataclass(frozen=True)
class Arguments:
    """Measure on a GPU what programs for one were compiled to take."""

    size: Literal["gpu", "tiny"] = "gpu"
    """The works: for one GPU, or small ones that only try this script."""
    minutes: float = 10
    """When to give up what is not done."""
    output: Path = Path("gpu.json")
    """Where all numbers go."""


def works(arguments: Arguments) -> list[Work]:
    if arguments.size == "tiny":
        tiny = Work("random:tiny", batch_size=4, iterations=1)
        ragged = replace(tiny, mean_response_length=8, packed_sizes=2)
        return [replace(tiny, decode_batches=(1, 2)), ragged]
    base = Work("random:qwen2.5-0.5b", dtype="bfloat16", iterations=1)
    even = replace(base, batch_size=64, prompt_length=128, response_length=128)
    ragged = replace(
        base,
        batch_size=256,
        prompt_length=192,
        response_length=512,
        mean_response_length=278,
        epochs=1,
        microbatches=16,
        packed_sizes=2,  # more take longer to compile
    )
    return [replace(even, decode_batches=(1, 16, 64, 256)), ragged]


def main() -> None:
    arguments = flags.parse(Arguments(), sys.argv[1:], prog="python benchmarks/gpu.py")
    jax.config.update("jax_platforms", "cpu")  # of this process; the device is for the others
    until = time.monotonic() + 60 * arguments.minutes
    console, reports = Console(width=110), []
    for work in works(arguments):
        console.print(f"{name_of(work)} ...")
        try:
            reports.append(measured(work, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            console.print("given up, no time is left")
            break
        arguments.output.write_text(json.dumps(reports, indent=1) + "\n")
    if reports:
        say(reports, console)


def measured(work: Work, seconds: float) -> dict[str, Any]:
    changed = {k: v for k, v in asdict(work).items() if v != getattr(Work(), k)}
    changed = {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
    command = [*PROGRAM, *suite.words(changed)]
    return suite.run(command, suite.common_environment(), timeout=max(seconds, 1))


def say(reports: list[dict[str, Any]], console: Console) -> None:
    first = reports[0]
    console.print(
        f"{first['device']}: {first['matmul_gflops'] / 1e3:.1f} TFLOP/s in a large matrix product, "
        f"{first['read_gb_per_s']:.0f} GB/s read"
    )
    decoding = Table("generation, rows", "tokens/s", "ms a token", "of its floor")
    for row in first["decode"]:
        decoding.add_row(*decoding_cells(first, row))
    iterations = Table(
        "iteration", "rollout, s", "of its floor", "update, s", "MFU", "tokens/s", "memory, GiB",
        "of its least",
    )  # fmt: skip
    for report in reports:
        iterations.add_row(*iteration_cells(report))
    console.print(decoding, iterations)


def decoding_cells(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    work, rows = work_of(report), row["batch_size"]
    seconds = rows * work.response_length / row["generated_tokens_per_s"]
    lengths = [(work.prompt_length, work.response_length)] * rows
    limits = 1e9 * report["matmul_gflops"], 1e9 * report["read_gb_per_s"]
    floor = floor_seconds(SHAPES[work.model], work, lengths, *limits)["rollout"]
    return [
        str(rows),
        f"{row['generated_tokens_per_s']:,.0f}",
        f"{1e3 * seconds / work.response_length:.2f}",
        f"{seconds / floor:.2f}",
    ]


def iteration_cells(report: dict[str, Any]) -> list[str]:
    work, seconds, times = work_of(report), report["seconds"], report["times_its_floor"]
    iteration = Iteration(work)
    reference = size_of(iteration.params["backbone"])
    least = size_of(iteration.state) + reference + iteration.least_kept()
    return [
        name_of(work),
        f"{seconds['rollout']:.2f}",
        f"{times['rollout']:.2f}",
        f"{seconds['update']:.2f}",
        f"{1 / times['update']:.2f}",
        f"{report['tokens_per_s']:,.0f}",
        f"{report['peak_memory_gib']:.1f}",
        f"{report['peak_memory_gib'] * GIB / least:.2f}",
    ]


def work_of(report: dict[str, Any]) -> Work:
    return Work(**report["work"])


def name_of(work: Work) -> str:
    mean = work.mean_response_length
    if mean is None:
        return f"{work.batch_size} x ({work.prompt_length} + {work.response_length})"
    prompt = (1 + work.prompt_length) // 2
    return f"{work.batch_size} x ({prompt} + {mean} of {work.response_length})"


if __name__ == "__main__":
    main()
