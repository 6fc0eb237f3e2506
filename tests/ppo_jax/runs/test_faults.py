"""Every write of a short run fails in turn; the run that is resumed is the one that never failed.

The agent is a script that trains nothing, so that a run takes a fraction of a second. Everything
else is what real runs have. A fault comes where Python asks the system for something: to open a
file for writing, to write to it, to make, rename or sync one. The libraries that write from C++ and
Rust count as one request before they have written and one after.
"""

import builtins
import errno
import gc
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file as real_save_file

from ppo_jax.algorithm import no_moments
from ppo_jax.config import preset
from ppo_jax.files import atomic
from ppo_jax.learning.batch import Controls
from ppo_jax.learning.learner import TrainState
from ppo_jax.models import PolicyValueNetwork
from ppo_jax.runs.folder import RunFolder
from ppo_jax.runs.ppo import PPOTrainer
from ppo_jax.runs.run import Run
from qwen_env.episodes import Episode, Outcome
from qwen_env.errors import UserFacingError
from qwen_env.prompts import Prompt
from qwen_env.tokenizer import Tokenizer

ITERATIONS = 3
CONFIG = preset("pocket")
CONFIG = replace(
    CONFIG,
    run=replace(
        CONFIG.run, num_iterations=ITERATIONS, eval_every=1, save_every=2, keep_checkpoints=1
    ),
)
PROMPTS = [
    Prompt("The plot", np.array([5, 6], np.int32), {"prompt": "The plot"}, i) for i in (0, 1)
]


class ScriptedAgent:
    """What a run needs of an agent; an iteration adds its number to every parameter."""

    num_iterations = ITERATIONS
    config = CONFIG

    def __init__(self, network: PolicyValueNetwork, tokenizer: Tokenizer):
        self._graphdef, params = nnx.split(network)
        self.initial_backbone = params["backbone"]
        self.task = SimpleNamespace(
            prompts=PROMPTS, tokenizer=tokenizer, rules=SimpleNamespace(max_new_tokens=4)
        )
        self.state = TrainState(
            params=jax.tree.map(jnp.copy, params),
            opt_state=jax.tree.map(jnp.zeros_like, params),
            controls=Controls(jnp.float32(0.05), no_moments()),
            warmup=None,
            reference=None,
            root_key=jax.random.key_data(jax.random.key(0)),
            iteration=jnp.int32(0),
            nonfinite_in_a_row=jnp.int32(0),
        )
        self.distributions: dict[str, np.ndarray] = {}
        self.tokens: dict[str, Any] | None = None

    @property
    def iteration(self) -> int:
        return int(self.state.iteration)

    @property
    def network(self) -> PolicyValueNetwork:
        return nnx.merge(self._graphdef, self.state.params)

    def evaluate(
        self, prompts: list[Prompt], *, greedy: bool, on_batch: Callable[[int], object]
    ) -> tuple[list[Episode], list[Outcome]]:
        """The second iteration's model is the best."""
        score = -abs(self.iteration - 2.0) - 0.5 * greedy
        pairs = [self._episode(prompt, score + prompt.index) for prompt in prompts]
        return [episode for episode, _ in pairs], [outcome for _, outcome in pairs]

    def learn(self) -> Iterator[tuple[Any, dict[str, float]]]:
        while self.iteration < self.num_iterations:
            self.state = _learnt(self.state)
            self.distributions = {"ratio": np.full(40, self.iteration)}
            self.tokens = {"iteration": self.iteration, "episodes": [7]}
            pairs = [self._episode(prompt, prompt.index) for prompt in PROMPTS]
            experience = SimpleNamespace(
                episodes=[episode for episode, _ in pairs],
                outcomes=[outcome for _, outcome in pairs],
            )
            names = ("score", "score_std", "kl")
            metrics = {f"objective/{name}": 0.5 * self.iteration for name in names}
            metrics |= {"policy/entropy": 1.0, "rollout/length_mean": 2.0}
            yield (
                experience,
                {"iteration": self.iteration, **metrics, "throughput/tokens_per_s": 3.0},
            )

    def _episode(self, prompt: Prompt, score: float) -> tuple[Episode, Outcome]:
        info = {
            "completion": "was",
            "completion_length": 1,
            "finish_reason": "eos",
            "reward_components": {"gold": score / 2},
        }
        return Episode(prompt, np.array([7], np.int32), "eos"), Outcome(score, info)


@jax.jit
def _learnt(state: TrainState) -> TrainState:
    iteration = state.iteration + 1
    params = jax.tree.map(lambda x: x + 0.01 * iteration, state.params)
    return state._replace(params=params, iteration=iteration)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


class Disk:
    """Counts the requests that concern files below a folder, and fails some of them."""

    def __init__(self, folder: Path):
        self.folder = str(folder)
        self.fails: Callable[[int], BaseException | None] = lambda number: None
        self.requests: list[str] = []
        self.is_dead = False  # then nothing cleans up

    def request(self, what: str, path: object) -> None:
        if self.is_dead:
            raise Killed
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not os.path.abspath(path).startswith(self.folder):
            return
        if what == "fsync" and "/arrays/" in path:  # one file after the other
            return
        self.requests.append(f"{what} {path}")
        if error := self.fails(len(self.requests)):
            self.is_dead = isinstance(error, Killed)
            raise error


class _File(io.FileIO):
    disk: Disk

    def write(self, data: Any) -> int:
        try:
            self.disk.request("write", self.name)
        except BaseException:
            super().write(memoryview(data)[: len(data) // 2])
            raise
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.disk.request("truncate", self.name)
        return super().truncate(size)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path / "run")
    real_open = io.open

    def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        inside = not isinstance(file, int) and os.path.abspath(file).startswith(disk.folder)
        if not inside or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, *args, **kwargs)
        disk.request("open", file)
        raw = _File(file, mode.replace("b", "").replace("t", ""))
        raw.disk = disk
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    def watch(name: str) -> None:
        real = getattr(os, name)

        def function(path: Any, *args: Any, **kwargs: Any) -> Any:
            place = f"/proc/self/fd/{path}" if isinstance(path, int) else path
            disk.request(name, os.readlink(place) if isinstance(path, int) else place)
            # Nothing here survives a crash of the system, and waiting takes long.
            return None if name == "fsync" else real(path, *args, **kwargs)

        monkeypatch.setattr(os, name, function)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", open_)
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "sendfile"):
        watch(name)
    real_save = ocp.Checkpointer.save

    def save(self: ocp.Checkpointer, path: Path, *args: Any, **kwargs: Any) -> None:
        disk.request("Orbax", path)
        real_save(self, path, *args, **kwargs)
        disk.request("after Orbax", path)

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    monkeypatch.setattr("ppo_jax.runs.folder.plot_curves", lambda run, path: save_png(path))

    def save_file(tensors: Any, path: Any, **kwargs: Any) -> None:
        disk.request("safetensors", path)
        real_save_file(tensors, path, **kwargs)
        disk.request("after safetensors", path)

    for name, module in list(sys.modules.items()):
        if name.startswith("ppo_jax.") and getattr(module, "save_file", None) is real_save_file:
            monkeypatch.setattr(module, "save_file", save_file)
    return disk


def save_png(path: Path) -> None:
    """Nothing is drawn."""
    with atomic(path) as partial:
        partial.write_bytes(b"PNG")


@pytest.fixture
def go(
    make_network: Callable[..., PolicyValueNetwork], tokenizer: Tokenizer
) -> Callable[[Path], None]:
    """Start the run of a folder or, where there is one, resume it."""
    network = make_network(num_hidden_layers=1)

    def go(folder: Path) -> None:
        resume = (folder / "config.json").exists()
        run_folder = RunFolder(folder, CONFIG, resume=resume)
        with run_folder.locked():
            agent: Any = ScriptedAgent(network, tokenizer)
            Run(PPOTrainer(agent, agent.task.prompts), run_folder).go(resume=resume)

    return go


def content(folder: Path) -> dict[str, Any]:
    """What must be the same, of a run that has ended."""
    files = (
        "metrics.jsonl",
        "distributions.jsonl",
        "samples.jsonl",
        "tokens.jsonl",
        "curves.png",
    )
    models = (path for name in ("best", "final") for path in sorted((folder / name).rglob("*")))
    names = [*files, *(path.relative_to(folder) for path in models if path.is_file())]
    checkpoints = folder / "checkpoints"
    saved = json.loads((checkpoints / str(ITERATIONS) / "checkpoint.json").read_text())
    return {
        **{str(name): (folder / name).read_bytes() for name in names},
        "settings": json.loads((folder / "config.json").read_text())["run"],
        "arrays": saved["arrays"],
        "best": saved["notes"]["best_iteration"],
        "checkpoints": sorted(path.name for path in checkpoints.iterdir()),
        "files": sorted(path.name for path in folder.iterdir() if path.suffix != ".bak"),
    }


def test_an_uninterrupted_run(go: Callable[[Path], None], disk: Disk) -> None:
    folder = Path(disk.folder)
    go(folder)
    found = content(folder)
    assert found["best"] == 2
    assert found["checkpoints"] == ["3"]
    assert len(disk.requests) > 100
    before = found
    go(folder)
    assert content(folder) == before


def fails_once(number: int) -> Callable[[int], BaseException | None]:
    return lambda i: OSError(errno.EIO, os.strerror(errno.EIO)) if i == number else None


def fails_from(number: int) -> Callable[[int], BaseException | None]:
    return lambda i: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if i >= number else None


def killed_at(number: int) -> Callable[[int], BaseException | None]:
    return lambda i: Killed() if i == number else None


FAULTS = (fails_once, fails_from, killed_at)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # who is killed closes nothing
def test_a_run_with_a_fault_is_resumed_to_the_same_end(
    go: Callable[[Path], None], disk: Disk, capfd: pytest.CaptureFixture[str]
) -> None:
    """One kind of fault a request, which FAULT_SHIFT=1 and 2 change for the other two."""
    folder = Path(disk.folder)
    shift = int(os.environ.get("FAULT_SHIFT", 0))
    go(folder)
    expected, requests = content(folder), list(disk.requests)
    for number, request in enumerate(requests, start=1):
        fault = FAULTS[(number + shift) % len(FAULTS)]
        shutil.rmtree(folder)
        disk.requests.clear()
        disk.fails = fault(number)
        try:
            go(folder)
        except Killed:
            assert fault is killed_at
        except UserFacingError as error:
            message = f"{fault.__name__}, {request}: {error}"
            assert re.search(r" cannot be written: (No space|Input/output)", str(error)), message
        disk.fails, disk.is_dead = lambda number: None, False
        go(folder)
        assert content(folder) == expected, f"{fault.__name__}, {request}"
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err
