"""Every benchmark of training in one run: one table, and suite.json beside it.

    python benchmarks/suite.py --model SMOLLM2_FOLDER --peer-python .venv-trl/bin/python
    python benchmarks/suite.py --machine gpu

Each work runs twice, in processes of its own and with a compilation cache of its own: the first
finds it empty (cold) and is timed in full, the second finds it filled (warm) and stops after one
iteration. Both are shown as the time from the program's start to the end of the first iteration,
less what an iteration takes later on: what one waits for before work begins. With --peer-python,
TRL's PPO and transformers' generate follow on the same model and work. All processes let malloc use
huge pages (see the README). Seconds, GiB, tokens a second.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ppo_jax import flags

HERE = Path(__file__).parent
Report = dict[str, Any]
UNTIL = "start_to_end_of_first_iteration_s"


@dataclass(frozen=True)
class Arguments:
    """What is run, and where the numbers go."""

    machine: Literal["cpu", "gpu", "tiny"] = "cpu"
    """Which works: for two CPU cores, for one GPU, or small ones that only try this script."""
    model: str | None = None
    """SmolLM2-135M for the CPU's works: a folder in Hugging Face layout, or a .gguf file."""
    peer_model: str | None = None
    """The same model as a folder, for the peers; None takes `model`."""
    peer_python: str | None = None
    """Python of an environment with torch and trl==1.10.0; None leaves the peers out."""
    output: Path = Path("suite.json")
    """Where the numbers go."""


@dataclass(frozen=True)
class Case:
    """A work of `benchmarks/ppo.py`: its name here, and its flags."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    has_peers: bool = False


def cases(arguments: Arguments) -> list[Case]:
    smollm2 = {"model": arguments.model}
    qwen = {"model": "random:qwen2.5-0.5b"}
    match arguments.machine:
        case "tiny":
            tiny = {"model": "random:tiny", "iterations": 2}
            packed = {"batch_size": 16, "mean_response_length": 8, "packed_sizes": 2}
            return [
                Case("tiny", tiny | {"decode_batches": [1, 4]}),
                Case("tiny, packed", tiny | packed),
            ]
        case "gpu":
            on_gpu = qwen | {"dtype": "bfloat16", "iterations": 3}
            long = {
                "batch_size": 256,
                "prompt_length": 192,
                "response_length": 512,
                "mean_response_length": 278,
                "epochs": 1,
                "microbatches": 16,
                "packed_sizes": 8,
            }
            short = {"batch_size": 64, "prompt_length": 128, "response_length": 128}
            decode = {"decode_batches": [1, 16, 64, 256]}
            return [
                Case("256 x (104 + 278 of 512), 1 epoch", on_gpu | long),
                Case("64 x (128 + 128), 4 epochs", on_gpu | short | decode),
            ]
        case "cpu":
            half = qwen | {"batch_size": 4, "prompt_length": 64, "response_length": 64}
            half |= {"iterations": 2}
            works = [
                Case("0.5B, 4 x (64 + 64), float32", half),
                Case("0.5B, 4 x (64 + 64), bfloat16 storage", half | {"param_dtype": "bfloat16"}),
            ]
            if arguments.model is None:
                return works
            grown = [
                Case(f"135M, {size} x (24 + 32)", smollm2 | {"batch_size": size, "iterations": 2})
                for size in (16, 64)
            ]
            ragged = {
                "model": "random:smollm2-135m",  # of a trained model, lengths are not in our hands
                "batch_size": 32,
                "response_length": 64,
                "mean_response_length": 20,
                "iterations": 3,
            }
            return [
                Case("135M, 8 x (24 + 32)", smollm2, has_peers=True),
                Case("135M, 32 x (24 + 32)", smollm2 | {"batch_size": 32, "iterations": 3}),
                *grown,
                Case("135M, 32 x (12 + 20 of 64)", ragged),
                Case("135M, the same, packed", ragged | {"packed_sizes": 8}),
                *works,
            ]


def main() -> None:
    arguments = flags.parse(Arguments(), sys.argv[1:], prog="python benchmarks/suite.py")
    console = Console()
    results: dict[str, Report] = {}
    for case in cases(arguments):
        console.print(f"{case.name} ...")
        results[case.name] = measured(case)
        if case.has_peers and arguments.peer_python is not None:
            results |= peers(case, arguments)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(results))
    console.print(f"All numbers are in {arguments.output}.")


def measured(case: Case) -> Report:
    """Cold and in full, then warm up to the end of the first iteration."""
    program = [sys.executable, str(HERE / "ppo.py"), "--json"]
    with tempfile.TemporaryDirectory() as cache:
        environment = common_environment() | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        report = run([*program, *words(case.flags)], environment)
        once = run([*program, *words(case.flags | {"iterations": 0})], environment)
    later = report["seconds"]["iteration"]
    return report | {"cold_start_s": report[UNTIL] - later, "warm_start_s": once[UNTIL] - later}


def common_environment() -> dict[str, str]:
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}


def peers(case: Case, arguments: Arguments) -> dict[str, Report]:
    """TRL's PPO, and transformers' generate alone, on the same work."""
    model = arguments.peer_model or arguments.model

    def timed(script: str) -> Report:
        program = [str(arguments.peer_python), str(HERE / "peers" / script), "--model", str(model)]
        return run(program, common_environment())

    trl = timed("trl_ppo.py")
    trl["cold_start_s"] = trl[UNTIL] - trl["seconds"]["iteration"]
    generate = timed("transformers_generate.py")
    return {f"TRL 1.10: {case.name}": trl, f"transformers: {case.name}": generate}


def run(command: list[str], environment: dict[str, str], timeout: float = 1800) -> Report:
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout
    )
    return json.loads(done.stdout.splitlines()[-1])


def words(flags: dict[str, Any]) -> list[str]:
    """`{"batch_size": 4, "remat": True}` as `--batch-size 4 --remat`."""
    result: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        result += [f"--{name.replace('_', '-')}", *map(str, values)]
    return result


COLUMNS: dict[str, tuple[str, ...]] = {
    "rollout": ("seconds", "rollout"),
    "update": ("seconds", "update"),
    "iteration": ("seconds", "iteration"),
    "/ floor": ("times_its_floor", "iteration"),
    "update / floor": ("times_its_floor", "update"),
    "tokens/s": ("tokens_per_s",),
    "GiB": ("peak_memory_gib",),
    "cold": ("cold_start_s",),
    "warm": ("warm_start_s",),
}


def table(results: dict[str, Report]) -> Table:
    result = Table("work", *COLUMNS)
    for name, report in results.items():
        result.add_row(name, *(shown(report, path) for path in COLUMNS.values()))
    return result


def shown(report: Report, path: tuple[str, ...]) -> str:
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
